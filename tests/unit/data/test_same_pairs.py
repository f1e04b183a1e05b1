"""Pairs as people keep them: every kind of source packs to the bytes of the csv of those pairs."""

import csv
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmscale.data.pack import PackSettings, pack
from mmscale.data.sources import read_source
from mmscale.data.sources.columns import parse_columns
from mmscale.errors import ConfigError, DataError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
datasets = pytest.importorskip("datasets")

NAMES = [f"{'a' if n % 2 else 'b'}/p{n:02d}.png" for n in range(12)]
PAIRS = sorted(
    (name, [f'picture {n}; größer, "{k}"' for k in range(1 + n % 3)])
    for n, name in enumerate(NAMES)
)
SEVERAL = [(name, captions) for name, captions in PAIRS if len(captions) > 1]
SETTINGS = PackSettings(samples_per_shard=5)


def picture(number):
    pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


BYTES = {name: picture(number) for number, name in enumerate(NAMES)}


def images(folder):
    for name, content in BYTES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def table(file, header, rows, separator=","):
    with file.open("w", newline="") as opened:
        csv.writer(opened, delimiter=separator).writerows([header, *rows])


def columns(pairs=PAIRS):
    return {"image": [name for name, _ in pairs], "caption": [captions for _, captions in pairs]}


def struct(path=lambda name: name):
    return [{"bytes": BYTES[name], "path": path(name)} for name, _ in PAIRS]


def write_parquet(file, fields, **options):
    parquet.write_table(pyarrow.table(fields), file, **options)


def rows():
    return [(name, caption) for name, captions in PAIRS for caption in captions]


def as_csv(folder):
    images(folder)
    table(folder / "mine.csv", ["image", "caption"], rows())
    return folder / "mine.csv"


def as_tsv(folder):
    images(folder)
    table(folder / "mine.tsv", ["filepath", "title"], rows(), "\t")
    return folder / "mine.tsv"


def as_json_cells(folder):
    images(folder)
    cells = [(name, json.dumps(captions)) for name, captions in PAIRS]
    table(folder / "mine.csv", ["filename", "sentences"], cells)
    return folder


def as_texts_beside(folder):
    images(folder)
    for name, captions in PAIRS:
        (folder / name).with_suffix(".txt").write_text(json.dumps(captions))
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.png").write_bytes(b"not one of them")
    return folder


def as_metadata_csv(folder):
    images(folder)
    table(folder / "metadata.csv", ["file_name", "text"], rows())
    return folder


def as_metadata_jsonl(folder):
    images(folder)
    lines = [json.dumps({"file_name": name, "captions": captions}) for name, captions in PAIRS]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def as_metadata_parquet(folder):
    images(folder)
    write_parquet(folder / "metadata.parquet", columns())
    return folder


def as_parquet_of_paths(folder):
    images(folder)
    write_parquet(folder / "mine.parquet", columns(), row_group_size=5)
    return folder / "mine.parquet"


def as_parquet_of_structs(folder):
    folder.mkdir()
    write_parquet(folder / "mine.parquet", {**columns(), "image": struct()}, row_group_size=5)
    return folder / "mine.parquet"


def as_parquet_of_bytes(folder):
    """A caption a row, the names in a column of their own, in two files of a folder."""
    folder.mkdir()
    fields = {
        "jpg": [BYTES[name] for name, _ in rows()],
        "file_name": [name for name, _ in rows()],
        "caption": [caption for _, caption in rows()],
    }
    whole = pyarrow.table(fields)
    parquet.write_table(whole.slice(0, 8), folder / "train-00000-of-00002.parquet")
    parquet.write_table(whole.slice(8), folder / "train-00001-of-00002.parquet")
    return folder


def as_saved(folder):
    """What `save_to_disk` writes: images lose their folders there, so names have a column."""
    texts = datasets.Value("string")
    features = {"image": datasets.Image(), "caption": datasets.List(texts), "file_name": texts}
    fields = {**columns(), "image": struct(), "file_name": [name for name, _ in PAIRS]}
    made = datasets.Dataset.from_dict(fields, features=datasets.Features(features))
    made.save_to_disk(folder, num_shards=2)
    return folder


def as_repository(folder):
    (folder / "data").mkdir(parents=True)
    fields = {**columns(), "image": struct()}
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", fields)
    return Path(f"hf:{folder}")


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wanted")
    pack(as_csv(folder / "mine"), folder / "out", SETTINGS)
    return contents(folder / "out")


@pytest.mark.parametrize(
    "written",
    [
        as_tsv,
        as_json_cells,
        as_texts_beside,
        as_metadata_csv,
        as_metadata_jsonl,
        as_metadata_parquet,
        as_parquet_of_paths,
        as_parquet_of_structs,
        as_parquet_of_bytes,
        as_saved,
        as_repository,
    ],
)
def test_every_kind_of_source_packs_to_the_same_bytes(tmp_path, monkeypatch, wanted, written):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    source = written(tmp_path / "mine")
    (result,) = pack(source, tmp_path / "out", SETTINGS, workers=2)
    assert result.samples == len(PAIRS)
    assert contents(tmp_path / "out") == wanted


def test_splits_of_files_folders_and_sets(tmp_path):
    half = len(PAIRS) // 2
    made = datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_dict(columns(PAIRS[:half])),
            "validation": datasets.Dataset.from_dict(columns(PAIRS[half:])),
        }
    )
    files = tmp_path / "files"
    images(files)
    for split, part in made.items():
        part.to_parquet(files / f"{split}-00000-of-00001.parquet")
    saved = tmp_path / "saved"
    images(saved)
    made.save_to_disk(saved)
    for source in (files, saved):
        data = read_source(source, images=source)
        assert data.tells_splits
        assert [record.split for record in data.records] == ["train"] * half + ["val"] * half
    beside = tmp_path / "beside"
    for split in ("train", "dev"):
        (beside / split).mkdir(parents=True)
        (beside / split / "train.png").write_bytes(picture(1))
        (beside / split / "train.txt").write_text("A picture")
    assert [(r.key, r.split) for r in read_source(beside).records] == [
        ("dev_train", "val"),
        ("train_train", "train"),
    ]


def test_images_without_names_are_known_by_their_bytes(tmp_path):
    fields = {
        "image": [picture(1), picture(2), picture(1)],
        "text": ["One", "Two", "One again"],
    }
    write_parquet(tmp_path / "mine.parquet", fields)
    data = read_source(tmp_path / "mine.parquet")
    assert [(r.key, r.captions) for r in data.records] == [
        ("000000000", ("One", "One again")),
        ("000000001", ("Two",)),
    ]
    assert [r.image.read() for r in data.records] == [picture(1), picture(2)]


def test_images_of_one_name_and_other_bytes_are_images_of_their_own(tmp_path):
    fields = {
        "image": [{"bytes": picture(n), "path": "image.png"} for n in (1, 2, 1)],
        "text": ["One", "Two", "One again"],
    }
    write_parquet(tmp_path / "mine.parquet", fields)
    data = read_source(tmp_path / "mine.parquet")
    assert [record.captions for record in data.records] == [("One", "One again"), ("Two",)]
    assert any("1 images have the name of another" in note for note in data.notes)


def test_rows_of_a_large_group_are_read_in_any_order(tmp_path):
    fields = {"image": [picture(n) for n in range(100)], "text": [f"No {n}" for n in range(100)]}
    write_parquet(tmp_path / "mine.parquet", fields)
    records = read_source(tmp_path / "mine.parquet").records
    for place in (99, 3, 4, 70, 69, 0):
        assert records[place].image.read() == picture(place)


def test_labels_of_a_set_keep_their_names(tmp_path):
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["dog", "cat"]),
        }
    )
    fields = {"image": struct()[:2], "text": ["A cat", "A dog"], "label": [1, 0]}
    datasets.Dataset.from_dict(fields, features=features).save_to_disk(tmp_path / "mine")
    data = read_source(tmp_path / "mine")
    assert data.classes == ("cat", "dog")
    assert [record.label for record in data.records] == [0, 1]


def test_columns_are_guessed_and_told_or_asked_for(tmp_path):
    images(tmp_path)
    body = [(name, captions[0], "wrong") for name, captions in PAIRS]
    table(tmp_path / "mine.csv", ["photo", "what", "title"], body)
    with pytest.raises(DataError, match=r"its columns are photo, what, title; it needs one of"):
        read_source(tmp_path / "mine.csv")
    guessed = read_source(tmp_path / "mine.csv", columns=parse_columns("image=photo"))
    assert guessed.records[0].captions == ("wrong",)
    assert any("from the column photo, captions from title" in note for note in guessed.notes)
    asked = read_source(tmp_path / "mine.csv", columns=parse_columns("image=Photo, caption=what"))
    assert asked.records[0].captions == (PAIRS[0][1][0],)
    assert not any("from the column" in note for note in asked.notes)
    with pytest.raises(DataError, match="no column foto, which was asked for as image; it has ph"):
        read_source(tmp_path / "mine.csv", columns=parse_columns("image=foto"))
    with pytest.raises(ConfigError, match="is not a list of USE=COLUMN"):
        parse_columns("picture=photo")


def test_addresses_of_images_are_refused_with_the_tool_that_fetches_them(tmp_path):
    write_parquet(tmp_path / "mine.parquet", {"url": ["https://x/a.jpg"], "caption": ["A"]})
    with pytest.raises(DataError, match="download them with img2dataset"):
        read_source(tmp_path / "mine.parquet")
    table(tmp_path / "mine.csv", ["image", "caption"], [("https://x/a.jpg", "A")])
    with pytest.raises(DataError, match="download them with img2dataset"):
        read_source(tmp_path / "mine.csv")


def test_columns_where_there_are_none_are_refused(tmp_path):
    as_texts_beside(tmp_path / "mine")
    with pytest.raises(ConfigError, match="has no columns"):
        read_source(tmp_path / "mine", columns=parse_columns("image=photo"))


@pytest.mark.parametrize("where", ["mine.parquet", "hf:some/where", "."])
def test_without_the_extra_one_sentence_names_the_install(tmp_path, monkeypatch, where):
    as_parquet_of_paths(tmp_path)
    for name in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    source = Path(where) if where.startswith("hf:") else tmp_path / where
    with pytest.raises(ConfigError, match=r"which is not installed; run pip install 'mmscale\[da"):
        read_source(source)
