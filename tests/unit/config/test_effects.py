"""What a user sets and nothing reads is refused; what a preset leaves without effect is not."""

import pytest

from mmscale.config.effects import EFFECTS, value_at
from mmscale.config.load import flatten, load_config, preset_names, validate
from mmscale.errors import ConfigError

DATA = ["data.train=shards"]
FROZEN = ["model.vision.frozen=true", "model.text.frozen=true"]


@pytest.fixture
def settings(tmp_path):
    """A YAML file of a user with nothing but data."""
    path = tmp_path / "mine.yaml"
    path.write_text("data: {train: shards}\n", "utf-8")
    return str(path)


def test_every_setting_says_when_it_is_read():
    assert set(EFFECTS) == set(flatten(validate({"data": {"train": "shards"}})))


INERT = [
    (["stop.patience=2"], "stop.patience"),
    (["optim.schedule=plateau"], "optim.schedule"),
    (["optim.plateau.factor=0.1"], "optim.plateau.factor"),
    (["stop.metric=eval/i2t_r1", "data.eval=val"], "stop.metric"),
    (["eval.every=3 steps"], "eval.every"),
    (["probe.held_out=64"], "probe.held_out"),
    (["guard.action=off", "guard.patience=5"], "guard.patience"),
    (["guard.action=off", "guard.grace=5 steps"], "guard.grace"),
    (["data.hard_batches.share=0.9"], "data.hard_batches.share"),
    (["data.hard_batches.by=text"], "data.hard_batches.by"),
    (["data.hard_batches.window=3"], "data.hard_batches.window"),
    (["data.augment=none", "data.crop_scale=[0.5,1.0]"], "data.crop_scale"),
    (["data.cache_gb=3"], "data.cache_gb"),
    (["data.allow_pipe=true"], "data.allow_pipe"),
    (["run.overwrite=true"], "run.overwrite"),
    (["model.vision.frozen=true", "optim.lr_scale.vision=10"], "optim.lr_scale.vision"),
    (["model.text.frozen=true", "optim.weight_decay_scale.text=5"], "weight_decay_scale.text"),
    (["model.text.frozen=true", "optim.layer_decay.text=0.5"], "optim.layer_decay.text"),
    (["model.text.frozen=true", "model.text.checkpointing=true"], "model.text.checkpointing"),
    (["model.text.frozen=true", "optim.balance.band=[0.5,2]"], "optim.balance.band"),
    (["optim.balance.every=3"], "optim.balance.every"),
    (["optim.lr_scale.fusion=3"], "optim.lr_scale.fusion"),
    (["model.logit_scale.learn=false", "optim.lr_scale.scale=3"], "optim.lr_scale.scale"),
    (["optim.weight_decay_scale.scale=3"], "optim.weight_decay_scale.scale"),
    (["model.fusion.layers=3"], "model.fusion.layers"),
    (["model.momentum=0.9"], "model.momentum"),
    (["model.logit_scale.bias=-3"], "model.logit_scale.bias"),
    (["negatives.queue.source=online"], "negatives.queue.source"),
    (["negatives.queue.share=0.5"], "negatives.queue.share"),
    (["negatives.mining.share=0.5"], "negatives.mining.share"),
    (["model.head.hidden=64"], "model.head.hidden"),
    (["model.head.kind=mlp", "model.head.layers=4"], "model.head.layers"),
    (["model.head.text.kind=mlp", "model.head.image.hidden=64"], "model.head.image.hidden"),
    (["model.head.shrinkage=0.3"], "model.head.shrinkage"),
    (["model.head.fit_rows=30"], "model.head.fit_rows"),
    (["model.head.init=cca", "model.head.gain=2"], "model.head.gain"),
    (["checkpoint.best_is=min"], "checkpoint.best_is"),
    (["log.wandb_images=true"], "log.wandb_images"),
    (["log.page=false", "log.map=tsne"], "log.map"),
    (["loss.terms=[{kind: vicreg}]", "loss.precision=bf16"], "loss.precision"),
]


@pytest.mark.parametrize(("words", "path"), INERT, ids=lambda value: str(value))
def test_a_setting_that_nothing_reads_is_refused(settings, words, path):
    with pytest.raises(ConfigError) as caught:
        load_config([settings, *words])
    assert caught.value.exit_code == 2
    (line,) = str(caught.value).splitlines()
    assert path in line.partition("=")[0]
    assert "has an effect only " in line


@pytest.mark.parametrize(
    "words",
    [
        ["stop.patience=2", "optim.schedule=plateau", "optim.plateau.factor=0.1", "data.eval=val"],
        ["stop.patience=null", "eval.every=null", "optim.balance.band=null"],
        ["optim.lr_scale.vision=1.0", "model.vision.frozen=true"],
        ["data.hard_batches.table=x.npz", "data.hard_batches.share=0.9"],
        ["data.positive_share=0.5", "data.hard_batches.window=3"],
        ["model.head.image.kind=mlp", "model.head.hidden=64"],
        ["model.head.whiten=zca", "model.head.shrinkage=0.3"],
        ["eval.weights=ema", "model.momentum=0.9"],
        ["loss.preset=siglip", "model.logit_scale.bias=-3"],
        ["loss.terms=[{kind: matching}]", "model.fusion.layers=3", "optim.lr_scale.fusion=3"],
        ["run.resume=never", "run.overwrite=true"],
        ["loss.preset=siglip", "loss.precision=bf16"],
        [*FROZEN, "optim.lr_scale.head=3"],
    ],
)
def test_a_setting_that_something_reads_is_accepted(settings, words):
    load_config([settings, *words])


STAGES = (
    "stages=[{name: heads, duration: 1 epochs, train: [head, scale]%s},"
    "{name: all, duration: 1 epochs, train: %s}]"
)


def test_a_setting_that_one_stage_reads_is_accepted(settings):
    word = "optim.lr_scale.vision=0.1"
    load_config([settings, STAGES % ("", "[head, 'vision[-2:]']"), word])
    with pytest.raises(ConfigError, match="where vision is trained"):
        load_config([settings, STAGES % ("", "[head, text]"), word])


def test_a_stages_patience_needs_evaluations(settings):
    word = STAGES % (", patience: 2", "[head]")
    load_config([settings, word, "data.eval=val", "stop.metric=eval/i2t_r1"])
    with pytest.raises(ConfigError, match=r"stages\.0\.patience=2 has an effect only with"):
        load_config([settings, word])


OVERRIDES = (
    ["data.eval=null", "checkpoint.best=null"],
    ["data.feature_cache=null", "model.vision.frozen=true", "model.text.frozen=true"],
    ["data.augment=none"],
    ["stages=[]"],
    ["model.logit_scale.learn=false"],
    ["model.head.kind=mlp", "model.head.init=normal"],
)


@pytest.mark.parametrize("preset", preset_names())
@pytest.mark.parametrize("words", OVERRIDES, ids=str)
def test_a_preset_may_leave_a_setting_without_effect(preset, words):
    if preset in ("flickr8k", "flickr8k_finetune", "flickr30k_frozen") and words == ["stages=[]"]:
        words = ["stages=[]", "data.feature_cache=null"]
    load_config([preset, *words])


def test_a_word_over_a_preset_without_effect_is_refused():
    with pytest.raises(ConfigError, match=r"^stop\.patience=3 has an effect only with"):
        load_config(["demo", "data.eval=null", "stop.patience=3"])


def test_effects_cover_every_setting_of_the_schema():
    config = validate({"data": {"train": "shards"}})
    assert {path: value_at(config, path) for path in EFFECTS} == flatten(config)
