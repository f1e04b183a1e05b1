"""What an objective needs is built; what contradicts it is refused before torch is imported."""

import pytest

from mmscale.config.load import load_config
from mmscale.config.rules import needs_momentum, with_fusion_decided
from mmscale.errors import ConfigError

BASE = ["demo", "data.train=somewhere"]
MATCHING = "loss.terms=[{kind: infonce}, {kind: matching}]"
FROZEN = ["model.vision.frozen=true", "model.text.frozen=true", "data.augment=none"]


@pytest.mark.parametrize(
    ("words", "built"),
    [([], False), ([MATCHING], True), (["model.fusion.enabled=true"], True)],
)
def test_fusion_is_built_where_a_term_or_a_word_asks_for_it(words, built):
    config = with_fusion_decided(load_config([*BASE, *words]))
    assert config.model.fusion.enabled is built
    assert with_fusion_decided(config) == config


@pytest.mark.parametrize(
    ("words", "kept"),
    [([], False), (["eval.weights=ema"], True), (["loss.terms=[{kind: distillation}]"], True)],
)
def test_a_running_mean_is_kept_where_something_uses_it(words, kept):
    assert needs_momentum(load_config([*BASE, *words])) is kept


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([MATCHING, *FROZEN, "data.feature_cache=folder"], r"data\.feature_cache .*tokens"),
        (["model.head.text.init=cca"], r"model\.head\.text\.init=cca.*model\.head\.init=cca"),
        (["model.head={init: cca, image: {kind: mlp}}"], r"model\.head\.image\.kind=linear"),
        (["eval.rerank=16"], r"eval\.rerank=16.*matching"),
        ([MATCHING, "eval.rerank=4"], r"eval\.rerank=4 is shorter than the 10"),
        ([MATCHING, "model.fusion.enabled=false"], r"model\.fusion\.enabled=false"),
        (["loss.terms=[{kind: l2_start}]"], r"l2_start alone"),
        (["loss.terms=[{kind: infonce}, {kind: anchor, rows: 8}]"], r"rows with data alone"),
        (
            ["loss.terms=[{kind: infonce}, {kind: l2_start}, {kind: l2_start}]"],
            r"l2_start more than once; .*add up their weights",
        ),
        (["model.momentum=1.0"], r"model\.momentum"),
        (
            ["eval.sets={a: {data: x, kind: classes, classes: ''}}"],
            r"eval\.sets\.a\.classes.*an empty text names nothing",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        load_config([*BASE, *words])


def test_an_anchor_behind_a_stage_that_trains_towers_takes_no_features_from_a_cache():
    stage = "{name: %s, duration: 1 epochs, train: ['%s']}"
    towers, heads = stage % ("towers", "*"), stage % ("heads", "head")
    terms = "loss.terms=[{kind: infonce}, {kind: anchor}]"
    words = [*BASE, "data.augment=none", "data.feature_cache=folder"]
    with pytest.raises(ConfigError, match=r"stages\.1 holds an anchor.*feature_cache=null"):
        load_config([*words, terms, f"stages=[{towers}, {heads}]"])
    load_config([*words, terms, f"stages=[{heads}, {towers}]"])
    load_config([*words, f"stages=[{towers}, {heads}]"])
