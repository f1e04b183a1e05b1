"""Frozen teachers: found by name, fed with the batch of another model, told apart."""

from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPModel

from mmscale.checkpoint.state import RunState
from mmscale.config.load import validate
from mmscale.config.values import whole_steps
from mmscale.contracts import Batch, InputSpec, Position, World
from mmscale.data.features import CachedStream
from mmscale.data.pixels import normalise, resize_whole
from mmscale.data.schedule import plan_schedule
from mmscale.data.shards import open_shards
from mmscale.data.stream import Share, TrainStream, assemble
from mmscale.engine.feed import on_device
from mmscale.engine.plan import plan_batch
from mmscale.errors import CheckpointError, ConfigError
from mmscale.model.build import build_model
from mmscale.parallel.device import choose
from mmscale.parallel.peers import Alone
from mmscale.training.part import Step
from mmscale.training.parts.start import Begun, begun
from mmscale.training.parts.teacher import Teachers
from mmscale.training.stage import Start
from mmscale.training.teachers import (
    Repainted,
    cached_features,
    fed_with,
    open_teacher,
    open_teachers,
    taught_terms,
)
from tests.unit.model.tiny import model_config
from tests.unit.model.whole_hf import save_whole
from tests.unit.training.rows import features, loss_input

CAPTIONS = ["a red dog", "the small cat sits on the left of two large green circle", "two dog"]


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    kind = getattr(request, "param", "clip")
    folder = tmp_path_factory.mktemp("teacher") / kind
    save_whole(folder, kind)
    return folder


def config_of(folder, **term):
    model = model_config(embed_dim=12).model_dump(mode="json")
    terms = [{"kind": "teacher", "model": f"hf:{folder}", **term}]
    data = {"train": "unused", "image_size": 40}
    return validate({"data": data, "model": model, "loss": {"terms": terms}})


def photographs(side: int) -> torch.Tensor:
    """Bytes that are smooth, as photographs are."""
    coarse = torch.rand(len(CAPTIONS), 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return (255 * F.interpolate(coarse, (side, side), mode="bilinear")).round().to(torch.uint8)


def batch_of(spec: InputSpec, pixels: torch.Tensor) -> Batch:
    """As the stream makes it of a worker's share."""
    share = Share(tokens=spec.tokenize(CAPTIONS), captions=CAPTIONS, keys=list("abc"))
    share.teacher_tokens = {name: s.tokenize(CAPTIONS) for name, s in spec.teachers.items()}
    share.image_ids = share.match_ids = share.labels = [0, 1, 2]
    return assemble([share], normalise(pixels, spec), spec)


def part_of(config, spec, micro_rows=2) -> tuple[Teachers, InputSpec]:
    teachers = open_teachers(config, World(), lambda line: None)
    terms, policy = taught_terms(config), choose(config.engine)
    part = Teachers(teachers, terms, policy, spec, micro_rows, whole_steps)
    return part, fed_with(spec, teachers)


def test_rows_are_those_of_transformers_from_the_crop_of_the_trained_model(folder):
    config = config_of(folder)
    _, spec = build_model(config.model, 40, 0)
    part, fed = part_of(config, spec)
    assert (spec.image_size, fed.teachers[f"hf:{folder}"].image_size) == (40, 32)
    crop = photographs(40)
    batch = batch_of(fed, crop)
    found = part.encode(f"hf:{folder}", batch)
    own = CLIPModel.from_pretrained(folder).eval()
    resized = resize_whole(crop, 32, "squash", "bicubic")
    (theirs,) = fed.teachers.values()
    tokens = [theirs.tokenize([caption]) for caption in CAPTIONS]
    with torch.no_grad():
        image = own.get_image_features(pixel_values=normalise(resized, theirs)).pooler_output
        text = [own.get_text_features(input_ids=torch.tensor(row)).pooler_output for row in tokens]
        scale = own.logit_scale.exp()
    assert found.scale.item() == pytest.approx(scale.item(), rel=1e-6)
    torch.testing.assert_close(found.text, F.normalize(torch.cat(text)), atol=1e-6, rtol=1e-5)
    # Bytes are rounded after the resize there.
    torch.testing.assert_close(found.image, F.normalize(image), atol=1e-2, rtol=0)
    assert (found.image - found.image.roll(1, 0)).norm(dim=1).min() > 0.1
    whole, _ = part_of(config, spec, micro_rows=3)
    torch.testing.assert_close(vars(whole.encode(f"hf:{folder}", batch)), vars(found))


def test_pixels_are_resized_and_normalised_anew_as_bytes_would_be(folder):
    _, own = build_model(model_config(), 40, 0)
    theirs = open_teacher(f"hf:{folder}").spec
    assert (own.mean, own.std) != (theirs.mean, theirs.std)
    # Bytes are rounded, and what overshoots is cut, between height and width too.
    for side, bytes_off in ((40, 1.1), (64, 1.1), (24, 2.5)):
        crop = photographs(side)
        spec = InputSpec(side, own.mean, own.std, "bicubic", own.tokenize, 0, 8)
        found = Repainted(spec, theirs, torch.device("cpu"))(normalise(crop, spec))
        wanted = normalise(resize_whole(crop, 32, "squash", "bicubic"), theirs)
        off = 255 * (found - wanted) * torch.tensor(theirs.std)[:, None, None]
        assert off.abs().max() <= bytes_off
        assert off.mean().abs() < 0.02
    pixels = normalise(photographs(32), theirs)
    assert Repainted(theirs, theirs, torch.device("cpu"))(pixels) is pixels


def test_a_teacher_is_encoded_only_while_a_term_looks_at_it(folder):
    weight = {"from": 0, "to": 1, "over": "2 steps", "start": "3 steps"}
    config = config_of(folder, weight=weight)
    _, spec = build_model(config.model, 40, 0)
    part, fed = part_of(config, spec)
    batch = batch_of(fed, photographs(40))
    seen = []
    for step in range(6):
        part.before(Step(RunState(step)), batch)
        seen.append(bool(part.inputs(loss_input(3, 12), features(3, 12), batch).teachers))
    assert seen == [False] * 4 + [True] * 2


def test_terms_that_name_one_teacher_share_it(folder):
    config = config_of(folder)
    twice = config.loss.model_copy(update={"terms": config.loss.terms * 2})
    lines = []
    found = open_teachers(config.model_copy(update={"loss": twice}), World(), lines.append)
    assert [teacher.width for teacher in found] == [12]
    assert lines == [f"teacher: hf:{folder}, 12,289 parameters, 12 wide"]
    assert not any(parameter.requires_grad for parameter in found[0].model.parameters())


def test_features_of_another_width_are_refused_before_training(folder):
    config = config_of(folder, form="feature")
    wider = config.model_copy(update={"model": model_config(embed_dim=16)})
    with pytest.raises(ConfigError, match=r"16 wide and those of model=hf:.* 12; set model\.embed"):
        open_teachers(wider, World(), lambda line: None)


@pytest.mark.parametrize("folder", ["clip", "siglip"], indirect=True)
@pytest.mark.parametrize("words", [[], ["data.captions=2"]], ids=["one caption", "two"])
def test_cached_features_are_those_of_the_pictures_in_the_batch(folder, words, synthetic, tmp_path):
    """Where the trained model is fed as the teacher is: both see the same pictures."""
    cache = tmp_path / "cache"
    terms = f"loss.terms=[{{kind: teacher, model: 'hf:{folder}', cache: {cache}}}]"
    words = [*words, "data.augment=none", "train.global_batch_size=16", "data.workers=0", terms]
    config = synthetic.config(*words)
    shards, policy, said = (
        open_shards("data.train", str(synthetic.train)),
        choose(config.engine),
        [],
    )
    teachers = open_teachers(config, World(), said.append)
    tables = cached_features(config, teachers, shards, policy, Alone(), said.append)
    (spec,) = (teacher.spec for teacher in teachers)
    schedule = plan_schedule(config, shards, plan_batch(config, 1).lanes)
    part = Teachers(teachers, taught_terms(config), policy, spec, 5, whole_steps)
    streams = [
        TrainStream(config, shards, schedule, fed_with(spec, teachers), World()),
        TrainStream(config, shards, schedule, spec, World(), of_teachers=tables),
        # Of its own features.
        CachedStream(schedule, shards, tables[f"hf:{folder}"], World(), tables),
    ]
    for batches in zip(*(islice(stream.batches(Position()), 3) for stream in streams), strict=True):
        fed = [on_device(batch, policy.device, spec) for batch, _ in batches]
        assert fed[0].keys == fed[1].keys == fed[2].keys
        wanted, found, alone = (part.encode(f"hf:{folder}", batch) for batch in fed)
        torch.testing.assert_close((found.image, found.text), (wanted.image, wanted.text))
        torch.testing.assert_close((alone.image, alone.text), (wanted.image, wanted.text))
    # Another run finds them there.
    assert any("96 images through the frozen towers, once" in line for line in said)
    assert fed_with(spec, teachers, tables).teachers == {}
    said.clear()
    cached_features(config, teachers, shards, policy, Alone(), said.append)
    assert said == []


def test_the_start_is_a_copy_that_is_kept_by_name():
    model, spec = build_model(model_config(), 40, 0)
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start = begun(model, spec, 16, Start(RunState(), {}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    kept = {tensor.name.removeprefix("start."): tensor.value for tensor in Begun(start).tensors()}
    assert kept.keys() == first.keys()
    assert all(torch.equal(kept[name], first[name]) for name in first)
    later = begun(model, spec, 16, Start(RunState(), {}, begun=first))
    assert all(torch.equal(own, first[name]) for name, own in later.model.state_dict().items())
    del first["scale.log_scale"]
    with pytest.raises(CheckpointError, match=r"another model: .*the first scale\.log"):
        begun(model, spec, 16, Start(RunState(), {}, begun=first))


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("ViT-B-32", ConfigError, r"ViT-B-32: no such run or checkpoint; name a run"),
        ("hf:{empty}", ConfigError, r"model=hf:.*empty"),
        ("openclip:ViT-B-33", ConfigError, r"did you mean"),
        (
            "openclip:ViT-B-32",
            ConfigError,
            r"openai, .*; name them: openclip:ViT-B-32@WEIGHTS",
        ),
        ("openclip:ViT-B-32@laion3b", ConfigError, r"model\.weights=laion3b is neither"),
        ("{empty}", CheckpointError, r"neither a checkpoint nor a run with one"),
    ],
)
def test_a_teacher_that_is_not_there_is_refused_by_its_setting(name, error, said, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=said) as caught:
        open_teacher(name.format(empty=tmp_path / "empty"))
    assert str(caught.value).startswith("loss.terms holds teacher with model=")


def test_another_model_under_the_same_name_does_not_go_on(folder):
    config = config_of(folder)
    _, spec = build_model(config.model, 40, 0)
    part, _ = part_of(config, spec)
    kept = part.state()
    part.load(kept)
    kept["digests"][f"hf:{folder}"] = "0" * 64
    with pytest.raises(ConfigError, match=r"not the model that the run was trained with"):
        part.load(kept)
