import base64
import io
from dataclasses import replace

import pytest
import torch
from PIL import Image

from mmscale.data.reader import SampleReader
from mmscale.data.shards import open_shards
from mmscale.diagnostics.pairs import Pairs, Sources
from mmscale.diagnostics.space import snapshot
from mmscale.report.examples import Examples, choose_examples, choose_suspects
from mmscale.report.maps import draw_maps
from tests.unit.diagnostics.faulty_embeddings import healthy


@pytest.fixture(scope="module")
def shards(synthetic):
    return open_shards("data.eval", str(synthetic.train))


@pytest.fixture(scope="module")
def pairs(shards) -> Pairs:
    """The 96 images with two of their captions, in a healthy space that knows nothing of them."""
    reader = SampleReader(shards)
    samples = [
        reader.read(number, place)
        for number, shard in enumerate(shards.shards)
        for place in range(shard.samples)
    ]
    reader.close()
    made = healthy(0.5)(len(samples), 32, 0)
    ids = torch.tensor([sample.image_id for sample in samples])
    captions = [caption for sample in samples for caption in sample.captions[:2]]
    sources = Sources(torch.arange(len(ids)), [sample.key for sample in samples], captions)
    return Pairs(
        made.image,
        made.text.repeat_interleave(2, dim=0),
        ids,
        ids.repeat_interleave(2),
        sources=sources,
    )


def test_photographs_are_those_of_their_keys(pairs, shards, tmp_path):
    chosen = choose_examples(pairs, shards, pytest.fail)
    chosen.write(tmp_path)
    assert Examples.read(tmp_path) == chosen
    assert len(chosen.points) == 96
    reader, number = SampleReader(shards), 40
    sample = reader.read(number // 32, number % 32)
    photo = chosen.photos[number]
    assert (photo.key, photo.id) == (sample.key, sample.image_id)
    assert chosen.points[number].caption == sample.captions[0]
    small = Image.open(io.BytesIO(base64.b64decode(photo.picture.partition(",")[2])))
    given = Image.open(io.BytesIO(sample.image)).convert("RGB").resize(small.size)
    differences = torch.tensor(list(small.convert("RGB").tobytes())) - torch.tensor(
        list(given.tobytes())
    )
    assert differences.abs().float().mean() < 6
    reader.close()


def test_answers_name_the_photographs_of_their_captions(pairs, shards):
    chosen = choose_examples(pairs, shards, pytest.fail)
    owner = {}
    for row, caption in enumerate(pairs.sources.captions):
        owner.setdefault(caption, set()).add(row // 2)
    assert len(chosen.best) == len(chosen.worst) == 8
    for answer in (*chosen.best, *chosen.worst):
        assert answer.photo in owner[answer.caption]
        assert (answer.rank == 1) == answer.found[0].right
        for found in answer.found:
            assert (found.photo == answer.photo) == found.right
            assert found.caption is None or found.photo in owner[found.caption]


def test_the_same_image_under_two_ids_is_found(pairs, shards):
    """Rows of equal features whose pictures differ are no twins; the same picture twice is."""
    features = torch.randn(len(pairs.image), 16)
    features[1] = features[0]
    features[50] = features[60]
    places = pairs.sources.places.clone()
    places[50] = places[60]
    sources = replace(pairs.sources, places=places)
    twice = replace(pairs, backbone_image=features, sources=sources)
    chosen = choose_examples(twice, shards, pytest.fail)
    assert [twins.photos for twins in chosen.twins] == [(50, 60)]


def test_missing_shards_leave_the_examples_without_photographs(pairs, shards, tmp_path):
    gone = replace(shards, paths=tuple(tmp_path / path.name for path in shards.paths))
    told = []
    chosen = choose_examples(pairs, gone, told.append)
    assert len(told) == 1
    assert "without photographs" in told[0]
    assert chosen.points
    assert not any(photo.picture for photo in chosen.photos.values())


def test_dots_name_the_pair_that_they_show(pairs, shards):
    chosen = choose_examples(pairs, shards, pytest.fail)
    moments = [{"step": step, **snapshot(pairs)} for step in (1, 2)]
    for drawn in draw_maps(moments, chosen, "pca"):
        for dots in (drawn.images, drawn.captions):
            assert [dot.pair for dot in dots] == list(range(96))
            assert all(0 <= dot.x <= 200 and 0 <= dot.y <= 200 for dot in dots)


def test_the_suspects_of_another_set_take_the_place_of_ones_own(pairs, shards, make_examples):
    text = pairs.text.clone()
    text[[10, 11, 80, 81]] = text[[80, 81, 10, 11]]
    found = choose_suspects(replace(pairs, text=text), shards, "train", pytest.fail)
    assert {doubt.photo for doubt in found.doubts} == {5, 40}
    own = make_examples()
    both = own.with_suspects_of(found)
    assert (both.points, both.best) == (own.points, own.best)
    assert [both.photos[doubt.photo] for doubt in both.doubts] == [
        found.photos[doubt.photo] for doubt in found.doubts
    ]
    assert not both.named_photos() - set(both.photos)
    assert both.searched == "train"
