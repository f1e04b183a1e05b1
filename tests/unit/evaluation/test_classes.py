"""Zero-shot classification: its counts, its lists of names and templates, and frozen towers."""

import json

import open_clip
import pytest
import torch

from mmscale.config.evaluation import EvalSetConfig
from mmscale.config.load import load_config
from mmscale.data.scenes import SHAPES
from mmscale.data.shards import open_train
from mmscale.engine.encode import Encoder
from mmscale.engine.inference import Inference
from mmscale.errors import ConfigError, DataError, HaltError
from mmscale.evaluation.classes import Predictions, class_figures, classify, open_classes
from mmscale.evaluation.encoded import encoded_sets
from mmscale.evaluation.sets import as_logged, evaluate_sets
from mmscale.model.build import build_model
from mmscale.parallel.device import choose
from mmscale.parallel.peers import Alone
from tests.ranks.tiny import tiny_config
from tests.unit.evaluation.test_sets import TEXT


@pytest.fixture
def shapes(tmp_path):
    path = tmp_path / "shapes.txt"
    path.write_text("\n".join(SHAPES) + "\n", "utf-8")
    return path


def test_counts_become_shares():
    ahead = torch.tensor([0, 0, 3, 4, 5, 0])
    labels = torch.tensor([0, 0, 0, 2, 2, 6])
    found = Predictions(torch.arange(6), labels, labels, ahead)
    figures = class_figures(found, 7, Alone())
    assert figures == pytest.approx(
        {
            "top1": 50.0,
            "top5": 100 * 5 / 6,
            # Of the classes with images: two of three, none of two, one of one.
            "mean_per_class": 100 * (2 / 3 + 0 + 1) / 3,
            "images": 6,
            "classes": 7,
        }
    )
    few = Predictions(torch.arange(2), torch.tensor([0, 1]), labels[:2], torch.tensor([0, 2]))
    assert class_figures(few, 4, Alone()).keys() == figures.keys() - {"top5"}


def chosen(shards, classes, **more):
    return EvalSetConfig(data=str(shards), kind="classes", classes=str(classes), **more)


def opened(shards, classes, **more):
    return open_classes("eval.sets.s.", chosen(shards, classes, **more), None, False)


def test_lists_come_from_files_or_from_open_clip(synthetic, shapes, tmp_path):
    usual = opened(synthetic.val, shapes)
    assert usual.classes == SHAPES
    assert list(usual.templates) == list(open_clip.OPENAI_IMAGENET_TEMPLATES)
    listed = tmp_path / "names.json"
    listed.write_text(json.dumps(SHAPES))
    simple = opened(synthetic.val, listed, templates="simple")
    assert simple.classes == SHAPES
    assert list(simple.templates) == list(open_clip.SIMPLE_IMAGENET_TEMPLATES)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a {}\na drawing of a {}.\n")
    mine = opened(synthetic.val, "imagenet", templates=str(prompts))
    assert list(mine.classes) == list(open_clip.IMAGENET_CLASSNAMES)
    assert mine.templates == ("a {}", "a drawing of a {}.")


BAD_LISTS = {
    "empty line": ("classes", "circle\n\nstar\n", r"classes=\S+: entry 2 is empty"),
    "empty file": ("classes", "", r"entry 1 is empty"),
    "repeated": ("classes", "star\ncircle\nstar\n", r"names 'star' twice"),
    "no text": ("classes", "[1, 2]", r"entry 1 is empty or no text"),
    "torn": ("classes", '["a", ', r"cannot be read"),
    "too few": ("classes", "circle\n", r"has the label \d, which is none of the 1 classes"),
    "no place": ("templates", "a drawing\n", r"templates=\S+: 'a drawing' must have \{\} once"),
    "other braces": ("templates", "a {} {0.x}\n", r"must have \{\} once"),
}


@pytest.mark.parametrize(("setting", "text", "told"), BAD_LISTS.values(), ids=BAD_LISTS)
def test_a_list_that_is_none_is_refused(synthetic, shapes, tmp_path, setting, text, told):
    path = tmp_path / "list.txt"
    path.write_text(text, "utf-8")
    lists = {"classes": shapes, setting: str(path)}
    with pytest.raises(DataError, match=told) as caught:
        opened(synthetic.val, **lists)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ("{data: x, kind: classes}", r"eval\.sets\.s\.classes is not set; name a file"),
        ("{data: x, classes: a.txt}", r"classes=a\.txt has an effect only with .*kind=classes"),
        ("{data: x, templates: simple}", r"templates=simple has an effect only with"),
        ("{data: x, kind: labels}", r"eval\.sets\.s\.kind='labels' must be 'retrieval' or 'clas"),
    ],
)
def test_settings_of_the_other_kind_are_refused(tmp_path, entry, told):
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"data: {{train: t}}\neval: {{sets: {{s: {entry}}}}}\n", "utf-8")
    with pytest.raises(ConfigError, match=told):
        load_config([str(mine)])


def evaluated(synthetic, shapes, config_words, broken=False):
    labelled = chosen(synthetic.val, shapes, templates="simple").model_dump(exclude_unset=True)
    settings = {"data__train": str(synthetic.train), "data__workers": 0, "eval__batch_size": 7}
    settings |= {"model__text__options": TEXT, "eval__sets": {"shapes": labelled}}
    config = tiny_config(**settings, **config_words)
    model, spec = build_model(config.model, None, 0)
    if broken:
        with torch.no_grad():
            model.head["image"].layers[0].weight.fill_(torch.nan)
    inference = Inference(model, choose(config.engine))
    encoder = Encoder.of(config, inference.call, inference.device, spec, Alone())
    train = open_train(config.data)
    sets = encoded_sets(config, model, encoder, train, lambda line: None)[1]
    calls = []

    def counted(mode, *inputs):
        calls.append(mode)
        return inference.call(mode, *inputs)

    found = [
        as_logged(evaluate_sets(config, counted, inference.device, sets, Alone())) for _ in range(2)
    ]
    return found, calls


def test_frozen_towers_look_at_images_and_prompts_once(synthetic, shapes, tmp_path):
    frozen = {f"model__{tower}__frozen": True for tower in ("vision", "text")}
    frozen |= {"data__augment": "none"}
    plain, every = evaluated(synthetic, shapes, frozen)
    folder = str(tmp_path / "features")
    cached, calls = evaluated(synthetic, shapes, frozen | {"data__feature_cache": folder})
    assert plain[0].keys() == {
        f"eval/shapes/{name}" for name in ("top1", "top5", "mean_per_class", "images", "classes")
    }
    assert plain == cached == [plain[0]] * 2
    for mode in ("image", "text"):
        assert calls.count(mode) * 2 == every.count(mode)


def test_a_model_that_is_broken_halts(synthetic, shapes):
    with pytest.raises(HaltError, match="of labelled images or of prompts are not finite"):
        evaluated(synthetic, shapes, {}, broken=True)


def test_progress_is_told_of_images_and_then_of_classes(synthetic, shapes):
    model, spec = build_model(tiny_config(model__text__options=TEXT).model, None, 0)
    inference = Inference(model, choose(tiny_config().engine))
    encoder = Encoder(inference.call, inference.device, spec, Alone(), 16)
    labelled = chosen(synthetic.val, shapes, templates="simple")
    told = []
    classify(
        encoder,
        open_classes("eval.sets.s.", labelled, spec, False),
        lambda done, total: told.append((done, total)),
    )
    # 16 rows are two classes of seven prompts.
    assert told == [(16, 24), (24, 24), (2, 8), (4, 8), (6, 8), (8, 8)]


def test_too_many_damaged_images_are_refused(tmp_path, shapes):
    (tmp_path / "pets" / "circle").mkdir(parents=True)
    (tmp_path / "pets" / "circle" / "a.png").write_bytes(b"torn")
    model, spec = build_model(tiny_config().model, None, 0)
    inference = Inference(model, choose(tiny_config().engine))
    encoder = Encoder.of(tiny_config(), inference.call, inference.device, spec, Alone())
    pets = open_classes("eval.sets.s.", chosen(tmp_path / "pets", shapes), spec, False)
    with pytest.raises(DataError, match=r"eval\.sets\.s\.data: 1 of 1 images cannot be decoded"):
        classify(encoder, pets)
