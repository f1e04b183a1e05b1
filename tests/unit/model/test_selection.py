"""What patterns of a stage match in a built model."""

import pytest

from mmscale.config.load import stage_config
from mmscale.errors import ConfigError
from mmscale.model.build import build_model
from mmscale.model.freezing import check_patterns, select
from tests.ranks.tiny import tiny_config

TEXT = {"width": 32, "heads": 2, "layers": 3, "context_length": 16, "vocab_size": 99}


def _config(*patterns, **settings):
    stages = [
        {"name": "some", "duration": "1 epochs", "train": list(patterns)},
        {"name": "all", "duration": "1 epochs"},
    ]
    return tiny_config(stages=stages, model__text__options=TEXT, **settings)


def _selected(config):
    model, _ = build_model(stage_config(config, 0).model, None, 0)
    check_patterns(model, config)
    lines = select(model, config, 0)
    return model, lines, {name for name, p in model.named_parameters() if p.requires_grad}


def test_components_and_names():
    model, lines, trained = _selected(_config("head", "scale", "vision.trunk.ln_post.*"))
    assert {name.split(".")[0] for name in trained} == {"head", "scale", "vision"}
    assert {name for name in trained if name.startswith("vision.")} == {
        "vision.trunk.ln_post.weight",
        "vision.trunk.ln_post.bias",
    }
    assert lines[0] == "stage 1 of 2, 'some', trains"
    assert "vision.trunk.ln_post.*: 2 tensors, 64 parameters" in lines[3]
    assert model.frozen == {"text"}


def test_the_last_blocks_of_a_tower_and_nothing_below_them():
    model, _, trained = _selected(_config("head", "text[-2:]"))
    blocks = model.text.block_parameters()
    wanted = {f"text.trunk.{name}" for block in blocks[-2:] for name in block}
    assert {name for name in trained if name.startswith("text.")} == wanted
    assert wanted
    assert model.frozen == {"vision"}


def test_what_rests_stays_in_evaluation_mode_and_what_trains_does_not():
    model, _, trained = _selected(_config("text[-1:]"))
    model.train()
    assert not model.vision.training
    modes = {name: model.get_submodule(name).training for name, _ in model.named_modules() if name}
    for name in trained:
        assert modes[name.rsplit(".", 1)[0]], name
    first = model.text.block_parameters()[1][0].rsplit(".", 1)[0]
    assert not modes[f"text.trunk.{first}"]


def test_everything_is_everything_that_is_trained_without_stages():
    config = _config("*")
    model, _ = build_model(config.model, None, 0)
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    assert _selected(config)[2] == before


def test_a_run_without_stages_is_left_alone():
    config = tiny_config()
    model, _ = build_model(config.model, None, 0)
    check_patterns(model, config)
    assert select(model, config, 0) == []
    assert model.frozen == frozenset()


@pytest.mark.parametrize("pattern", ["heads", "vision[9]", "vision.trunk.nothing.*", "fusion"])
def test_a_pattern_that_matches_nothing_is_refused(pattern):
    with pytest.raises(ConfigError, match="of stage 'some' matches no parameter"):
        _selected(_config("head", pattern))


def test_a_pattern_of_a_later_stage_is_refused_at_the_start():
    config = tiny_config(
        stages=[
            {"name": "first", "duration": "1 epochs"},
            {"name": "later", "duration": "1 epochs", "train": ["hed"]},
        ]
    )
    model, _ = build_model(stage_config(config, 0).model, None, 0)
    with pytest.raises(ConfigError, match="'hed' of stage 'later'"):
        check_patterns(model, config)


def test_a_pattern_that_only_finds_a_frozen_tower_is_refused():
    with pytest.raises(ConfigError, match=r"unfreeze model\.vision"):
        _selected(_config("head", "vision.*", model__vision__frozen=True))
