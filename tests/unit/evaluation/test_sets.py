"""Named evaluation sets: each is measured as `data.eval` is, cached or not, and has its name."""

import pytest

from mmscale.config.evaluation import logged, set_named_in
from mmscale.config.load import load_config
from mmscale.data.shards import open_train
from mmscale.engine.encode import Encoder
from mmscale.engine.inference import Inference
from mmscale.errors import ConfigError, DataError
from mmscale.evaluation.encoded import encoded_sets
from mmscale.evaluation.sets import as_logged, evaluate_sets
from mmscale.model.build import build_model
from mmscale.parallel.device import choose
from mmscale.parallel.peers import Alone
from tests.ranks.tiny import tiny_config

# As in `tiny_config`, with all of CLIP's words.
TEXT = {"width": 32, "heads": 2, "layers": 1, "context_length": 16}


def evaluated(synthetic, sets, **settings):
    """What an untrained model finds on `data.eval` and the named sets, and the sets."""
    named = {name: {"data": str(folder)} for name, folder in sets.items()}
    data = {
        "model__text__options": TEXT,
        "data__train": str(synthetic.train),
        "data__eval": str(synthetic.val),
    }
    config = tiny_config(**{**data, "data__workers": 0, "eval__sets": named, **settings})
    model, spec = build_model(config.model, None, 0)
    inference = Inference(model, choose(config.engine))
    encoder = Encoder.of(config, inference.call, inference.device, spec, Alone())
    found = encoded_sets(config, model, encoder, open_train(config.data), lambda line: None)[1]
    return evaluate_sets(config, inference.call, inference.device, found, Alone()), found


def test_every_set_is_measured_as_data_eval_is(synthetic):
    named, _ = evaluated(synthetic, {"again": synthetic.val, "other": synthetic.test})
    swapped, _ = evaluated(synthetic, {}, data__eval=str(synthetic.test))
    assert list(named) == ["main", "again", "other"]
    assert named["again"].figures == named["main"].figures
    assert named["other"].figures == swapped["main"].figures
    assert named["other"].figures != named["main"].figures
    line = as_logged(named)
    assert line["eval/mean"] == line["eval/again/mean"] == named["main"].figures["mean"]
    assert line["eval/other/i2t_r1"] == named["other"].figures["i2t_r1"]
    assert len(line) == 3 * len(named["main"].figures)


def test_a_run_may_have_named_sets_alone(synthetic):
    named, _ = evaluated(synthetic, {"other": synthetic.test}, data__eval=None)
    assert list(named) == ["other"]
    assert all(name.startswith("eval/other/") for name in as_logged(named))


def test_the_features_of_frozen_towers_serve_every_set(synthetic, tmp_path):
    sets = {"again": synthetic.val, "other": synthetic.test}
    frozen = {f"model__{tower}__frozen": True for tower in ("vision", "text")}
    frozen |= {"data__augment": "none"}
    plain, _ = evaluated(synthetic, sets, **frozen)
    folder = tmp_path / "features"
    cached, found = evaluated(synthetic, sets, **frozen, data__feature_cache=str(folder))
    assert as_logged(cached) == as_logged(plain)
    assert all(held_out.table is not None for held_out in found.values())
    # Those of data.train, of data.eval, which `again` is too, and of `other`.
    assert len(list(folder.glob("*.safetensors"))) == 3


def test_a_set_whose_folder_does_not_exist_is_named(synthetic, tmp_path):
    with pytest.raises(DataError, match=r"^eval\.sets\.other\.data=\S+nowhere: no shard matches"):
        evaluated(synthetic, {"other": tmp_path / "nowhere"})


def test_a_set_without_captions_is_refused(synthetic, tmp_path):
    (tmp_path / "pets" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match=r"pets: has no manifest.*is of kind: classes$") as caught:
        evaluated(synthetic, {"pets": tmp_path / "pets"})
    assert len(str(caught.value).splitlines()) == 1


BAD = [
    (["eval.sets.main.data=a"], r"eval\.sets=.*without a set named main, which is data\.eval"),
    (["eval.sets={a/b: {data: x}}"], r"without 'a/b': a set's name has letters"),
    (["eval.sets={a: {}}"], r"eval\.sets\.a\.data is not set"),
    (["eval.sets={a: shards}"], r"eval\.sets\.a=shards|eval\.sets\.a='shards' must be settings"),
    (["eval.sets={a: {date: x, data: y}}"], r"eval\.sets\.a\.date is not .* eval\.sets\.a\.data"),
    (["eval.sets.a.data=$D/x"], r"eval\.sets\.a\.data=\$D/x: `\$D` is not filled in"),
    (["eval.sets.a.data=x", "checkpoint.best=eval/b/mean"], r"the evaluation set b, and there is"),
    (["data.eval=null", "eval.sets.a.data=x", "stop.patience=2"], r"name eval/a/FIGURE"),
]


@pytest.mark.parametrize(("words", "told"), BAD, ids=lambda value: str(value))
def test_a_set_that_cannot_be_is_refused(tmp_path, words, told):
    mine = tmp_path / "mine.yaml"
    mine.write_text("data: {train: shards, eval: val}\n", "utf-8")
    with pytest.raises(ConfigError, match=told) as caught:
        load_config([str(mine), *words])
    assert len(str(caught.value).splitlines()) == 1


def test_two_sets_of_one_name_are_refused(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("data: {train: t}\neval: {sets: {a: {data: x}, a: {data: y}}}\n", "utf-8")
    with pytest.raises(ConfigError, match="the key 'a' is given twice"):
        load_config([str(mine)])


@pytest.mark.parametrize(("name", "figure"), [("main", "eval/mean"), ("coco", "eval/coco/mean")])
def test_a_logged_figure_tells_its_set(name, figure):
    assert logged(name, "mean") == figure
    assert set_named_in(figure) == name
