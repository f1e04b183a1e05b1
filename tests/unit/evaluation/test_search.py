"""Embeddings of a set are kept and searched: exact, never stale, and of what can be decoded."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from mmscale.data.images import LooseImages, PackedImages, open_images
from mmscale.diagnostics.pairs import similarities
from mmscale.engine.inference import Inference
from mmscale.errors import ConfigError, DataError
from mmscale.evaluation.image_index import ImageIndex, IndexPlace, index_of
from mmscale.evaluation.search import closest, found_in, query_row
from mmscale.evaluation.trained import Trained
from mmscale.model.build import build_model
from mmscale.parallel.device import choose
from tests.ranks.tiny import tiny_config


def trained(seed=0):
    text = {"width": 32, "heads": 2, "layers": 1, "context_length": 16}
    config = tiny_config(data__workers=0, model__text__options=text)
    model, spec = build_model(config.model, None, seed)
    checkpoint = SimpleNamespace()
    return Trained(config, model, spec, Inference(model, choose(config.engine)), checkpoint)


@pytest.fixture(scope="module")
def model():
    return trained()


@pytest.fixture(scope="module")
def images(synthetic):
    return open_images("--data", str(synthetic.val))


@pytest.fixture
def folder(synthetic, tmp_path):
    """Five image files at two depths, one of them broken, and files that are no images."""
    folder = tmp_path / "photographs"
    (folder / "more").mkdir(parents=True)
    files = sorted((synthetic.source / "images").iterdir())
    for name, file in zip(("b.jpg", "a.JPEG", "more/c.jpg", "more/d.jpg"), files, strict=False):
        shutil.copy(file, folder / name)
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image either")
    (folder / ".hidden.jpg").write_bytes(b"")
    return folder


class Counted:
    """A place for an index, and how often one was made."""

    def __init__(self, path, is_named=True):
        self.place, self.lines = IndexPlace(path, is_named), []

    @property
    def made(self):
        return sum("are encoded" in line for line in self.lines)

    def get(self, model, images):
        return index_of(model, images, self.place, self.lines.append)


def by_hand(rows, query, count):
    """The first rows in an order of exact products."""
    products = similarities(query[None], rows)[0].tolist()
    order = sorted(range(len(rows)), key=lambda row: (-products[row], row))
    return [(row, products[row]) for row in order[:count]]


@pytest.mark.parametrize("width", [3, 256])
def test_the_closest_rows_are_those_of_exact_products(width):
    """Also where they differ by less than fp32 tells, and where some are the same."""
    query = F.normalize(torch.randn(width), dim=0)
    rows = torch.randn(9000, width)
    rows[torch.randperm(9000)[:200]] = query + 3e-7 * torch.randn(200, width)
    rows = F.normalize(rows, dim=1)
    rows[-5:] = rows[7]
    expected = by_hand(rows, query, 150)
    for count in (1, 10, 150):
        assert closest(rows, query, count) == expected[:count]
    plain = (rows @ query).topk(150).indices.tolist()
    assert plain != [row for row, _ in expected], "fp32 alone would do"


def test_rows_that_are_all_the_same_come_in_their_order():
    rows = F.normalize(torch.ones(9000, 8), dim=1)
    assert [row for row, _ in closest(rows, rows[0], 4)] == [0, 1, 2, 3]
    assert len(closest(rows[:3], rows[0], 10)) == 3


def test_rows_that_are_no_numbers_are_refused():
    rows = torch.full((3, 4), torch.nan)
    with pytest.raises(DataError, match="NaN or infinity"):
        closest(rows, torch.ones(4), 1)


def test_an_index_is_made_once(tmp_path, model, images):
    counted = Counted(tmp_path / "deeper" / "index.safetensors")
    first = counted.get(model, images)
    second = counted.get(model, images)
    assert counted.made == 1
    assert torch.equal(first.image, second.image)
    assert [second.name(row) for row in range(24)] == [first.name(row) for row in range(24)]
    key, captions = second.name(3)
    image = images.reader().read(3)
    assert (key, captions) == (image.key, image.captions)
    assert len(captions) == 5


def test_another_model_or_other_images_make_another_index(tmp_path, model, images, synthetic):
    counted = Counted(tmp_path / "index.safetensors")
    counted.get(model, images)
    others = [
        (trained(seed=1), images),
        (replace(model, spec=replace(model.spec, mean=(0.1, 0.2, 0.3))), images),
        (model, open_images("--data", str(synthetic.test))),
        (model, images),
    ]
    for made, (other, others_images) in enumerate(others, start=2):
        counted.get(other, others_images)
        assert counted.made == made
    assert "another model or other images" in counted.lines[-1]


def test_an_unnamed_index_is_named_by_what_it_is_of(tmp_path, model, images):
    counted = Counted(tmp_path, is_named=False)
    for one in (model, trained(seed=1), model):
        counted.get(one, images)
    assert counted.made == 2
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_an_unnamed_index_that_cannot_be_kept_is_told(tmp_path, model, images):
    (tmp_path / "file").write_text("")
    counted = Counted(tmp_path / "file" / "search", is_named=False)
    assert len(counted.get(model, images).image) == 24
    assert "not kept" in counted.lines[-1]
    assert "--index" in counted.lines[-1]


def test_another_file_is_not_written_over(tmp_path, model, images):
    for content in (b"mine", b""):
        path = tmp_path / "mine.safetensors"
        path.write_bytes(content)
        with pytest.raises(DataError, match="not a search index"):
            Counted(path).get(model, images)
        assert path.read_bytes() == content
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(DataError, match="another kind of file"):
        Counted(path).get(model, images)


@pytest.mark.parametrize(
    "change",
    [
        {"image": torch.zeros(2, 4)},
        {"image": torch.zeros(3, 4, dtype=torch.float64)},
        {"places": torch.tensor([0, 1])},
        {"places": torch.tensor([0, 1, -1])},
        {"edges": torch.tensor([0, 9])},
        {"names": torch.zeros(9)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_damaged_index_is_refused(tmp_path, change):
    whole = ImageIndex(
        F.normalize(torch.ones(3, 4), dim=1),
        torch.arange(3),
        torch.zeros(9, dtype=torch.uint8),
        torch.tensor([0, 3, 6, 9]),
        "digest",
    )
    whole.save(tmp_path / "whole")
    with pytest.raises(DataError, match="no key and captions"):
        found_in(ImageIndex.load(tmp_path / "whole"), whole.image[0], 1)
    replace(whole, **change).save(tmp_path / "damaged")
    with pytest.raises(DataError, match=r"do not belong together|no places"):
        ImageIndex.load(tmp_path / "damaged")


def test_a_folder_of_image_files_is_searched_without_captions(tmp_path, model, folder):
    images = open_images("--data", str(folder))
    assert isinstance(images, LooseImages)
    counted = Counted(tmp_path / "index.safetensors")
    index = counted.get(model, images)
    names = [index.name(row) for row in range(4)]
    assert names == [(key, ()) for key in ("a.JPEG", "b.jpg", "more/c.jpg", "more/d.jpg")]
    assert "left out: 1; the first: broken.png" in counted.lines[-1]
    query = query_row(model, "", folder / "more" / "c.jpg", pytest.fail)
    first = found_in(index, query, 1)[0]
    assert first.key == "more/c.jpg"
    assert first.score == pytest.approx(1, abs=1e-6)
    # A file that changed, though it is as long as before.
    os.utime(folder / "b.jpg", (1, 1))
    counted.get(model, open_images("--data", str(folder)))
    assert counted.made == 2


def test_a_folder_with_shards_is_never_taken_for_image_files(synthetic, tmp_path):
    shutil.copytree(synthetic.val, tmp_path / "val")
    shutil.copy(next((synthetic.source / "images").iterdir()), tmp_path / "val" / "thumb.jpg")
    assert isinstance(open_images("--data", str(tmp_path / "val")), PackedImages)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no shard matches|no manifest|cannot be read"):
        open_images("--data", str(tmp_path / "empty"))


def test_where_nothing_can_be_decoded_nothing_is_searched(tmp_path, model):
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"no image can be decoded; the first: a\.jpg"):
        Counted(tmp_path / "index").get(model, open_images("--data", str(tmp_path)))


def test_words_and_an_image_together_lie_in_the_middle(model, folder):
    words, image = "a red circle", folder / "b.jpg"
    apart = [query_row(model, words, None, pytest.fail), query_row(model, "", image, pytest.fail)]
    both = query_row(model, words, image, pytest.fail)
    assert torch.equal(both, F.normalize(apart[0] + apart[1], dim=0))
    assert float(both @ apart[0]) == pytest.approx(float(both @ apart[1]), abs=1e-6)


def test_what_cannot_be_looked_for_is_refused_and_what_is_cut_is_told(model, folder):
    with pytest.raises(ConfigError, match="nothing to look for"):
        query_row(model, " ", None, pytest.fail)
    with pytest.raises(DataError, match=r"--image .*broken"):
        query_row(model, "", folder / "broken.png", pytest.fail)
    with pytest.raises(DataError, match=r"--image .*gone"):
        query_row(model, "", folder / "gone.png", pytest.fail)
    lines = []
    query_row(model, "dog " * 40, None, lines.append)
    assert "the first 16 tokens" in lines[0]


@pytest.mark.parametrize(
    ("model", "folder"),
    [
        ("runs/a", "runs/a/search"),
        ("runs/a/checkpoints/step-00000010", "runs/a/search"),
        ("export", "cache/mmscale/search"),
        ("openclip:ViT-B-32", "cache/mmscale/search"),
    ],
)
def test_an_index_lies_in_its_run_or_in_the_users_cache(tmp_path, monkeypatch, model, folder):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    Path("runs/a/checkpoints/step-00000010").mkdir(parents=True)
    Path("export").mkdir()
    assert IndexPlace.beside(model) == IndexPlace(Path(folder), False)
