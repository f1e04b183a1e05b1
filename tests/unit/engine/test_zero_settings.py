"""What DeepSpeed is told beyond its file."""

import json

import pytest
import torch

from mmscale.config.load import validate
from mmscale.engine.plan import plan_batch
from mmscale.engine.zero_settings import deepspeed_settings, ds_file
from mmscale.errors import ConfigError


def test_zero1_overlaps_where_a_batch_is_one_chunk():
    assert ds_file("zero1", 1)["zero_optimization"]["overlap_comm"] is True
    assert ds_file("zero1", 2)["zero_optimization"]["overlap_comm"] is False
    assert ds_file(None, 1) == ds_file("zero1", 1)


def test_a_file_that_overlaps_zero1_with_chunks_is_refused(tmp_path):
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1, "overlap_comm": True}}))
    assert ds_file(str(file), 1)["zero_optimization"]["overlap_comm"] is True
    with pytest.raises(ConfigError, match=r"loses the heads' gradient .* into 3 chunks; leave"):
        ds_file(str(file), 3)


def test_a_file_may_keep_the_timer_and_its_own_modules(tmp_path):
    file = tmp_path / "own.json"
    own = {
        "zero_optimization": {"stage": 2},
        "timers": {"throughput": {"enabled": True}},
        "torch_autocast": {"lower_precision_safe_modules": ["torch.nn.Linear"]},
    }
    file.write_text(json.dumps(own))
    config = validate({"data": {"train": "unused"}, "engine": {"deepspeed": str(file)}})
    plan = plan_batch(config, 1)
    told = deepspeed_settings(config, plan, torch.bfloat16)
    assert told["timers"] == own["timers"]
    assert told["torch_autocast"] == {
        "lower_precision_safe_modules": ["torch.nn.Linear"], "enabled": True, "dtype": "bfloat16",
    }  # fmt: skip
    shipped = validate({"data": {"train": "unused"}, "engine": {"deepspeed": "zero2"}})
    told = deepspeed_settings(shipped, plan, torch.bfloat16)
    assert told["timers"]["throughput"]["enabled"] is False
    modules = told["torch_autocast"]["lower_precision_safe_modules"]
    assert "torch.nn.modules.activation.MultiheadAttention" in modules
