"""Zero-shot classification is OpenCLIP's own: each prediction, on one rank and on two.

Two ranks give the figures of one to the last digit, on sets of pairs too.
"""

import io
import os
import tarfile

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mmscale.config.load import validate
from mmscale.contracts import World
from mmscale.engine.encode import Encoder
from mmscale.engine.inference import Inference
from mmscale.evaluation.classes import classify
from mmscale.evaluation.encoded import open_sets
from mmscale.evaluation.sets import as_logged, evaluate_sets
from mmscale.model.build import build_model
from mmscale.parallel.device import choose
from mmscale.parallel.peers import connect
from tests.ranks.launch import run_on_ranks
from tests.unit.model.test_openclip_weights import write_clip

NAMES = ("cat", "dog", "red bus", "snow", "a tree", "boat", "moon", "lamp", "old shoe", "river")
IMAGES = 200


@pytest.fixture(scope="module")
def pictures():
    """As large as the model's input, so that nobody resizes them."""
    draw = np.random.default_rng(0)
    colours = draw.integers(0, 256, (IMAGES, 4, 4, 3), dtype=np.uint8)
    return colours.repeat(8, axis=1).repeat(8, axis=2)


@pytest.fixture(scope="module")
def labels():
    return np.random.default_rng(1).integers(0, len(NAMES), IMAGES).tolist()


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    """A model whose images are not all alike to it, as they are to one of small first weights."""
    folder = tmp_path_factory.mktemp("clip") / "model"
    name = write_clip(folder, {})
    model = open_clip.create_model(name)
    with torch.no_grad():
        model.visual.class_embedding.zero_()
        model.visual.positional_embedding.zero_()
        model.token_embedding.weight.mul_(10)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return name


@pytest.fixture(scope="module")
def shards(pictures, labels, tmp_path_factory):
    """Two tars in webdataset's layout, without captions and without a manifest."""
    folder = tmp_path_factory.mktemp("pets")
    for number, part in enumerate((range(120), range(120, IMAGES))):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for place in part:
                add(tar, f"{place:04d}.png", png(pictures[place]))
                add(tar, f"{place:04d}.cls", str(labels[place]).encode())
    (folder / "classes.txt").write_text("\n".join(NAMES) + "\n", "utf-8")
    return folder


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def theirs(name, pictures, labels, templates):
    """Predictions, top-1 and top-5 of OpenCLIP's own model, transform and classifier.

    As its loop finds them: `open_clip_train.zero_shot.run`, which no longer runs with this numpy.
    """
    model, _, transform = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    classifier = open_clip.build_zero_shot_classifier(model.eval(), tokenizer, NAMES, templates)
    found, target = [], torch.tensor(labels)
    with torch.inference_mode():
        for part in torch.arange(IMAGES).split(64):
            images = torch.stack([transform(Image.fromarray(pictures[row])) for row in part])
            logits = 100.0 * model.encode_image(images, normalize=True) @ classifier
            found.append(logits.topk(5, 1, True, True)[1])
    first = torch.cat(found)
    right = first.eq(target[:, None]).double()
    return first[:, 0].tolist(), (float(right[:, 0].mean()), float(right.sum(dim=1).mean()))


def ours(world_size, name, places):
    """This rank's predictions by place, and the figures of all sets."""
    config = validate(
        {
            "data": {"train": "unused", "eval": places["val"], "workers": 0},
            "model": {"preset": f"openclip:{name}", "weights": "pretrained"},
            "eval": {
                "sets": {
                    "coco": {"data": places["test"]},
                    "pets": {
                        "data": places["pets"],
                        "kind": "classes",
                        "classes": f"{places['pets']}/classes.txt",
                    },
                },
                "batch_size": 48,
            },
        }
    )
    peers = connect(World(int(os.environ.get("RANK", 0)), world_size, 0, "test"))
    model, spec = build_model(config.model, None, 0)
    inference = Inference(model, choose(config.engine))
    encoder = Encoder.of(config, inference.call, inference.device, spec, peers)
    sets = open_sets(config, spec)
    found = classify(encoder, sets["pets"])
    figures = evaluate_sets(config, inference.call, inference.device, sets, peers)
    return dict(zip(found.places.tolist(), found.classes.tolist(), strict=True)), as_logged(figures)


def test_every_prediction_is_open_clips(name, pictures, labels, shards, synthetic):
    predictions, (top1, top5) = theirs(name, pictures, labels, open_clip.OPENAI_IMAGENET_TEMPLATES)
    assert len(set(predictions)) >= 4, "a model that always says the same shows nothing"
    places = {"val": str(synthetic.val), "test": str(synthetic.test), "pets": str(shards)}
    alone, figures = ours(1, name, places)
    assert alone == dict(enumerate(predictions))
    assert figures["eval/pets/top1"] == pytest.approx(100 * top1, abs=1e-9)
    assert figures["eval/pets/top5"] == pytest.approx(100 * top5, abs=1e-9)
    right = np.array(predictions) == np.array(labels)
    shares = [right[np.array(labels) == number].mean() for number in range(len(NAMES))]
    assert figures["eval/pets/mean_per_class"] == pytest.approx(100 * np.mean(shares), abs=1e-9)
    assert (figures["eval/pets/images"], figures["eval/pets/classes"]) == (IMAGES, len(NAMES))
    first, second = run_on_ranks(2, ours, 2, name, places)
    assert {"eval/mean", "eval/coco/mean"} <= figures.keys()
    assert first[1] == second[1] == figures, "of pairs too"
    assert not first[0].keys() & second[0].keys()
    assert first[0] | second[0] == alone
