"""Stages: what each one's configuration is, how long it lasts, and what is refused."""

import pytest

from mmscale.config.load import stage_config, validate
from mmscale.config.rules import blocks_of, expanded_stages
from mmscale.engine.plan import stage_lengths
from mmscale.errors import ConfigError

HEADS = {"name": "heads", "duration": "2 epochs", "train": ["head", "scale"]}
ALL = {"name": "all", "duration": "3 epochs"}


def _config(stages, **sections):
    return validate({"data": {"train": "unused"}, "stages": stages, **sections})


def _lengths(config, items=1000):
    stages = [
        stage_config(config, number) for number in range(max(1, len(expanded_stages(config))))
    ]
    return stage_lengths(config, stages, items)


def test_a_stage_is_the_run_with_what_it_says_put_over_it():
    second = {
        **ALL,
        "optim": {"lr": 1e-5, "lr_scale": {"text": 0.5}},
        "loss": {"terms": [{"kind": "hn_nce"}]},
        "negatives": {"queue": {"size": 64}},
        "data": {"augment": "flip"},
        "global_batch_size": 128,
    }
    config = _config([HEADS, second], optim={"weight_decay": 0.3, "lr_scale": {"vision": 0.1}})
    first, after = stage_config(config, 0), stage_config(config, 1)
    assert (first.optim.lr, first.optim.weight_decay) == (5e-4, 0.3)
    assert (after.optim.lr, after.optim.weight_decay) == (1e-5, 0.3)
    assert (after.optim.lr_scale.vision, after.optim.lr_scale.text) == (0.1, 0.5)
    assert [term.kind for term in first.loss.terms] == ["infonce"]
    assert [term.kind for term in after.loss.terms] == ["hn_nce"]
    assert (first.negatives.queue.size, after.negatives.queue.size) == (0, 64)
    assert (first.data.augment, after.data.augment) == ("crop", "flip")
    assert (first.train.global_batch_size, after.train.global_batch_size) == (256, 128)
    assert first.stages == after.stages == ()


def test_a_tower_that_no_pattern_can_match_is_frozen_so_that_its_features_may_be_cached():
    cached = {**HEADS, "data": {"feature_cache": "folder", "augment": "none"}}
    config = _config([cached, ALL])
    first, after = stage_config(config, 0), stage_config(config, 1)
    assert first.model.vision.frozen is True
    assert first.model.text.frozen is True
    assert after.model.vision.frozen is False
    assert after.data.feature_cache is None
    one = _config([{**HEADS, "train": ["head", "text[-1:]"]}, ALL])
    assert stage_config(one, 0).model.vision.frozen is True
    assert stage_config(one, 0).model.text.frozen is False


def test_unfreezing_cuts_a_stage_into_parts_that_train_more_blocks_each():
    parts = {**HEADS, "duration": "6 epochs", "unfreeze": {"parts": 3, "blocks": 2}}
    found = expanded_stages(_config([parts, ALL]))
    assert [stage.name for stage in found] == ["heads-1", "heads-2", "heads-3", "all"]
    assert [stage.train[2:] for stage in found[:3]] == [
        ("vision[-2:]", "text[-2:]"),
        ("vision[-4:]", "text[-4:]"),
        ("vision[-6:]", "text[-6:]"),
    ]
    assert [str(stage.duration) for stage in found] == ["2 epochs"] * 3 + ["3 epochs"]


@pytest.mark.parametrize(
    ("pattern", "picked"),
    [
        ("vision[-2:]", [3, 4]),
        ("text[0]", [0]),
        ("text[-1]", [4]),
        ("vision[1:3]", [1, 2]),
        ("vision[:2]", [0, 1]),
        ("vision[-5]", [0]),
    ],
)
def test_blocks_are_picked_as_python_slices(pattern, picked):
    tower, part = blocks_of(pattern)
    assert tower == pattern.split("[")[0]
    assert list(range(5))[part] == picked


@pytest.mark.parametrize("pattern", ["vision", "head[0]", "vision[]", "vision[-]", "vision[-:2]"])
def test_parameter_patterns_are_not_read_as_blocks(pattern):
    assert blocks_of(pattern) is None


def test_the_last_stage_lasts_until_the_run_ends():
    config = _config([HEADS, ALL], train={"duration": "10 epochs", "global_batch_size": 100})
    assert _lengths(config) == [20, 80]
    assert _lengths(_config([], train={"duration": "7 steps"})) == [7]


def test_stages_with_other_batch_sizes_share_the_runs_rows():
    """1,000 rows an epoch: 2 epochs in batches of 50, then 8 epochs in batches of 100."""
    config = _config(
        [{**HEADS, "global_batch_size": 50}, ALL],
        train={"duration": "10 epochs", "global_batch_size": 100},
    )
    assert _lengths(config) == [40, 80]


def test_epochs_that_leave_out_less_in_smaller_batches_still_add_up():
    """Of 1,000 rows batches of 300 take 900 an epoch, batches of 50 all of them."""
    smaller = {"name": "all", "duration": "10 epochs", "global_batch_size": 50}
    train = {"duration": "12 epochs", "global_batch_size": 300}
    assert _lengths(_config([HEADS, smaller], train=train)) == [6, 200]
    with pytest.raises(ConfigError, match=r"14 epochs \(all\) are 15,800 rows"):
        _lengths(_config([HEADS, {**smaller, "duration": "14 epochs"}], train=train))


@pytest.mark.parametrize("length", ["4 epochs", "2 epochs"])
def test_stages_longer_than_the_run_are_refused(length):
    config = _config([HEADS, ALL], train={"duration": length, "global_batch_size": 100})
    with pytest.raises(ConfigError, match=r"2 epochs \(heads\) \+ 3 epochs \(all\)"):
        _lengths(config)


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"optim": {"lrr": 1e-3}}, "stage 'all': optim.lrr is not a setting; did you mean"),
        ({"loss": {"preset": "clipp"}}, "stage 'all': loss.preset='clipp'"),
        ({"data": {"captions": "first"}}, "stages.1.data.captions cannot change within a run"),
        ({"train": []}, "stages.1.train is empty"),
        ({"negatives": {"queue": {"size": 8}}, "loss": {"terms": [{"kind": "vicreg"}]}}, "queue"),
        ({"duratoin": "3 epochs"}, "stages.1.duratoin"),
    ],
)
def test_errors_in_a_stage_name_the_stage(stage, said):
    with pytest.raises(ConfigError) as raised:
        _config([HEADS, {**ALL, **stage}])
    assert said in str(raised.value)
