"""ZeRO-3 gathers and reduces a block at a time: the same gradients, in far fewer exchanges."""

import json
import os

import pytest
import torch
from torch import nn

from mmscale.contracts import World
from mmscale.engine import deepspeed
from mmscale.errors import ConfigError
from mmscale.model.blocks import blocks
from mmscale.model.build import build_model
from mmscale.parallel.world import join_ranks
from tests.ranks.launch import run_on_ranks
from tests.ranks.live import listening
from tests.ranks.test_one_global_batch import assert_same
from tests.ranks.tiny import ROWS, tiny_config, train
from tests.unit.model import tiny as tiny_towers

# Everything but scalars is cut, so that every layer has to be gathered.
CUT = {
    "stage": 3,
    "overlap_comm": True,
    "reduce_bucket_size": 1000000,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 1,
}
VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "img_size": 16}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FAMILIES = ("open_clip", "timm", "transformers")
CHUNKS = (1, 3)


def _settings(family, folder):
    """Towers of one library with two blocks or more each."""
    vision = {"name": "timm:vit_tiny_patch16_224", "weights": "random", "options": VIT}
    bert = {"name": f"hf:{folder}/bert", "weights": "random", "options": NO_DROPOUT}
    return {
        "open_clip": {"model__text__options__layers": 2, "model__vision__checkpointing": True},
        # What is frozen up to a block leaves its input without a gradient.
        "timm": {"model__vision": vision, "model__text__frozen": True},
        "transformers": {"model__vision": vision | {"frozen": 1}, "model__text": bert},
    }[family]


def _train_each(kind, folder):
    """Results and what was sent, by family and chunks; with chunks also layer by layer."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    sharded = {"engine__deepspeed": f"{folder}/cut.json"} if kind == "deepspeed" else {}
    by_block, found = deepspeed._gather_by_block, {}
    cases = [(family, n, True) for family in FAMILIES for n in CHUNKS]
    cases += [(family, CHUNKS[-1], False) for family in FAMILIES if sharded]
    # Before DeepSpeed is imported, which keeps what it finds.
    with listening() as heard:
        join_ranks(World(), "gloo", 60, alone_too=True)
        for family, chunks, whole in cases:
            deepspeed._gather_by_block = by_block if whole else lambda library, model: None
            heard.clear()
            settings = _settings(family, folder) | sharded
            result = train(rank, world, kind, ROWS // world // chunks, 3, settings)
            found[family, chunks, whole] = result, dict(heard)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("towers")
    with pytest.MonkeyPatch.context() as patched:
        # As many tokens as the rows have, with the five that BERT brings.
        patched.setattr(tiny_towers, "WORDS", [f"word{number}" for number in range(94)])
        tiny_towers.save_bert(folder / "bert")
    (folder / "cut.json").write_text(json.dumps({"zero_optimization": CUT}))
    return folder


@pytest.fixture(scope="module")
def joint(folder):
    return run_on_ranks(1, _train_each, "accelerate", folder)[0]


@pytest.fixture(scope="module")
def sharded(folder):
    return run_on_ranks(2, _train_each, "deepspeed", folder)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunks", CHUNKS)
def test_a_block_at_a_time_is_exact(joint, sharded, family, chunks):
    wanted, _ = joint[family, 1, True]
    for rank in sharded:
        assert_same(rank[family, chunks, True][0], wanted, 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_exchanges_as_much_in_fewer_goes(sharded, family):
    (_, whole), (_, parts) = (sharded[0][family, CHUNKS[-1], by] for by in (True, False))
    gathers = [heard["all-gather", "times"] for heard in (whole, parts)]
    # What building and reading them takes is in both.
    assert gathers[0] < 0.75 * gathers[1]
    assert whole["all-gather", "bytes"] <= 1.01 * parts["all-gather", "bytes"], (whole, parts)


def test_blocks_of_every_library(folder):
    wanted = {"open_clip": (1, 2), "timm": (2, 1), "transformers": (2, 2)}
    for family, counts in wanted.items():
        model, _ = build_model(tiny_config(**_settings(family, folder)).model, None, 0)
        assert (len(blocks(model.vision)), len(blocks(model.text))) == counts, family


def test_a_block_that_is_not_called_with_its_tokens_is_refused():
    block = nn.TransformerEncoderLayer(8, 2, batch_first=True)
    block.register_forward_pre_hook(deepspeed._require_input)
    tokens = torch.randn(1, 3, 8, requires_grad=True)
    block(tokens)
    with pytest.raises(ConfigError, match="TransformerEncoderLayer is not called with its tokens"):
        block(src=tokens)
