import csv
import gzip
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from mmscale.data.sources import image_id_of, read_source
from mmscale.data.sources.layouts import shipped_recipes
from mmscale.data.synth import SynthSettings, render
from mmscale.errors import DataError

SHARDS = Path(__file__).parents[3] / "shards"


def add_images(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (8, 8), (len(name), 0, 0)).save(folder / name)


def by_key(source):
    return {record.key: record for record in source.records}


def reasons(source):
    return {rejection.key: rejection.reason for rejection in source.rejected}


@pytest.fixture
def flickr8k(tmp_path):
    add_images(tmp_path / "images", "1_a.jpg", "2_b.jpg", "3_c.jpg", "4_d.jpg")
    (tmp_path / "Flickr8k.token.txt").write_text(
        "1_a.jpg#1\tA second caption .\n1_a.jpg#0\tA first caption .\n"
        "2_b.jpg#0\tAnother dog .\n3_c.jpg#0\t \n4_d.jpg#0\tA cat .\n"
        "2258277193_586949ec62.jpg.1#0\tPeople waiting .\n"
        "no tab here\n"
    )
    (tmp_path / "Flickr_8k.trainImages.txt").write_text("1_a.jpg\n3_c.jpg\n9_z.jpg\n")
    (tmp_path / "Flickr_8k.devImages.txt").write_text("2_b.jpg\n")
    return tmp_path


def test_flickr8k_token_file_with_split_lists(flickr8k):
    source = read_source(flickr8k)
    records = by_key(source)
    assert source.name == "flickr8k"
    assert {key: record.split for key, record in records.items()} == {"1_a": "train", "2_b": "val"}
    assert records["1_a"].captions == ("A first caption .", "A second caption .")
    assert records["1_a"].image.is_file()
    (note,) = source.notes
    assert "1 of 4 images" in note
    assert "in no split list" in note


def test_lines_that_cannot_be_used_are_named(flickr8k):
    found = reasons(read_source(flickr8k))
    assert "not the name of an image" in found["2258277193_586949ec62.jpg.1"]
    assert found["Flickr8k.token.txt:7"] == "is not NAME#i<TAB>caption"
    assert found["3_c#0"] == "empty caption"
    assert found["3_c"] == "no caption"
    assert found["9_z"] == "no caption"


def test_gzipped_token_file_without_lists_is_all_train(tmp_path):
    add_images(tmp_path / "flickr30k-images", "10.jpg")
    with gzip.open(tmp_path / "results_20130124.token.gz", "wb") as file:
        file.write("10.jpg#0\tZwei Männer\u2028im Hof\r\n".encode())
    source = read_source(tmp_path)
    assert source.name == "flickr30k"
    assert by_key(source)["10"].captions == ("Zwei Männer\u2028im Hof",)
    assert source.splits == ("train",)


def test_karpathy_before_csv_before_token(tmp_path):
    render(tmp_path, SynthSettings(12, seed=0))
    name = json.loads((tmp_path / "dataset_flickr30k.json").read_text())["images"][0]["filename"]
    (tmp_path / "results.csv").write_text(
        f"image_name| comment_number| comment\n{name}| 0| From the table .\n"
        f"{name}| 1   Without a bar .\n"
    )
    key = name.removesuffix(".jpg")
    karpathy = read_source(tmp_path)
    assert karpathy.splits == ("train", "val", "test")
    assert len(by_key(karpathy)[key].captions) == 5
    assert by_key(karpathy)[key].label is not None
    (tmp_path / "dataset_flickr30k.json").unlink()
    assert by_key(read_source(tmp_path))[key].captions == ("From the table .", "Without a bar .")
    (tmp_path / "results.csv").unlink()
    assert len(read_source(tmp_path).records) == 12


def test_plain_csv_with_quotes_splits_and_ids(tmp_path):
    add_images(tmp_path / "images", "a.v1.png", "b.jpg")
    (tmp_path / "captions.csv").write_text(
        'image,caption,split,image_id\na.v1.png,"A dog, running",train,7\n'
        "a.v1.png,The same dog,train,7\nb.jpg,A cat,validation,8\n"
    )
    records = by_key(read_source(tmp_path))
    assert records["a_v1"].captions == ("A dog, running", "The same dog")
    assert (records["a_v1"].image_id, records["b"].image_id) == (7, 8)
    assert records["b"].split == "val"


def test_ids_that_are_not_unique_are_not_used(tmp_path):
    add_images(tmp_path / "images", "a.jpg", "b.jpg")
    (tmp_path / "captions.csv").write_text("image,caption,image_id\na.jpg,A,7\nb.jpg,B,7\n")
    assert [record.image_id for record in read_source(tmp_path).records] == [None, None]


def test_coco_annotations(tmp_path):
    add_images(tmp_path / "val2017", "000000000042.jpg")
    (tmp_path / "annotations").mkdir()
    content = {
        "images": [{"id": 42, "file_name": "000000000042.jpg"}],
        "annotations": [{"image_id": 42, "caption": "A bus ."}],
    }
    (tmp_path / "annotations" / "captions_val2017.json").write_text(json.dumps(content))
    (record,) = read_source(tmp_path).records
    assert (record.split, record.image_id, record.captions) == ("val", 42, ("A bus .",))


def test_a_name_that_leaves_the_folder_is_rejected(tmp_path):
    add_images(tmp_path / "images", "a.jpg")
    add_images(tmp_path, "secret.jpg")
    (tmp_path / "captions.csv").write_text("image,caption\na.jpg,A\n../secret.jpg,B\n")
    source = read_source(tmp_path)
    assert [record.key for record in source.records] == ["a"]
    assert [r.reason for r in source.rejected] == ["its file name leaves the folder of images"]


def test_one_key_for_two_images_is_rejected(tmp_path):
    add_images(tmp_path / "images", "a.jpg", "a.png")
    (tmp_path / "captions.csv").write_text("image,caption\na.jpg,A\na.png,B\n")
    source = read_source(tmp_path)
    assert by_key(source)["a"].captions == ("A",)
    assert reasons(source) == {"a": "duplicate key: another image has it"}


def test_an_image_in_two_splits_is_an_error(flickr8k):
    (flickr8k / "testImages.txt").write_text("1_a.jpg\n")
    with pytest.raises(DataError, match=r"1_a is in \w+ and in \w+"):
        read_source(flickr8k)


def test_a_recipe_names_the_parts(tmp_path):
    data = tmp_path / "data"
    add_images(data / "pictures", "a.jpg", "b.jpg")
    (data / "words.token").write_text("a.jpg#0\tA dog .\nb.jpg#0\tA cat .\n")
    (data / "held_out").write_text("b\n")
    (data / "rest").write_text("a\n")
    recipe = tmp_path / "pets.yaml"
    recipe.write_text(
        "name: pets\nroot: data\nimages: pictures\ncaptions: [absent.json, words.token]\n"
        "splits: {train: rest, test: held_out}\n"
    )
    source = read_source(recipe)
    assert {key: (r.split, r.source) for key, r in by_key(source).items()} == {
        "a": ("train", "pets"),
        "b": ("test", "pets"),
    }


@pytest.mark.parametrize(
    "text",
    ["!!python/object/apply:os.getcwd []", "unknown: 1", "[a]", "root: nowhere", "name: [x]"],
)
def test_a_wrong_recipe_is_refused(tmp_path, text):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    with pytest.raises(DataError, match=r"r\.yaml"):
        read_source(recipe)


@pytest.mark.parametrize("name", ["flickr8k", "flickr30k"])
def test_shipped_recipes_ask_for_their_data(name, tmp_path):
    recipe = tmp_path / f"{name}.yaml"
    recipe.write_bytes((SHARDS / f"{name}.yaml").read_bytes())
    with pytest.raises(DataError, match="unpack the data there"):
        read_source(recipe)
    folder = tmp_path / "originals" / name
    render(folder, SynthSettings(12, seed=0))
    if name == "flickr8k":
        (folder / "dataset_flickr30k.json").rename(folder / "dataset_flickr8k.json")
    source = read_source(recipe)
    assert (source.name, len(source.records)) == (name, 12)


def test_a_shipped_recipe_is_known_by_name_and_looks_below_the_working_folder(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert shipped_recipes() == sorted(path.stem for path in SHARDS.glob("*.yaml"))
    with pytest.raises(DataError, match="its root shards/originals/flickr8k is no folder"):
        read_source(Path("flickr8k"))
    root = tmp_path / "shards" / "originals" / "flickr8k"
    (root / "images").mkdir(parents=True)
    (root / "images" / "a.jpg").write_bytes(b"")
    (root / "captions.txt").write_text("image,caption\na.jpg,a dog\n", "utf-8")
    for name in ("flickr8k", "shards/flickr8k.yaml"):
        (record,) = read_source(Path(name)).records
        assert (record.source, record.captions) == ("flickr8k", ("a dog",))
    with pytest.raises(DataError, match="coco, flickr30k, flickr8k"):
        read_source(Path("flickr9k"))


def test_a_folder_without_a_known_layout_says_what_was_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"results_20130124\.token"):
        read_source(tmp_path)


def test_captions_without_images_say_where_images_were_looked_for(tmp_path):
    (tmp_path / "token.txt").write_text("a.jpg#0\tA dog .\n")
    with pytest.raises(DataError, match="none of the 1 images"):
        read_source(tmp_path)


def test_hashed_ids_fit_in_63_bits_and_differ_by_source():
    ids = {image_id_of(source, str(key)) for source in ("a", "b") for key in range(1000)}
    assert len(ids) == 2000
    assert all(0 <= number < 2**63 for number in ids)
    assert max(ids) > 2**62


def test_real_flickr8k():
    folder = Path(os.environ.get("MMSCALE_TEST_DATA", "")) / "flickr8k-mini"
    if "MMSCALE_TEST_DATA" not in os.environ or not folder.is_dir():
        pytest.skip("MMSCALE_TEST_DATA names no folder that holds flickr8k-mini")
    source = read_source(folder)
    counts = {s: sum(r.split == s for r in source.records) for s in source.splits}
    assert counts == {"train": 6000, "val": 1000}
    assert all(len(record.captions) == 5 for record in source.records)


def kaggle(folder, *names):
    """Kaggle's layout: everything one folder down, twice the same table."""
    add_images(folder / "flickr30k_images" / "flickr30k_images", *names)
    lines = "".join(f"{n}| {i}|  Caption {i} of {n} .\n" for n in names for i in range(5))
    # The row of 2199200615.jpg that lacks its second bar.
    lines = lines.replace(f"{names[0]}| 4|  Caption", f"{names[0]}| 4   Caption")
    for place in (folder, folder / "flickr30k_images"):
        (place / "results.csv").write_text(f"image_name| comment_number| comment\n{lines}")


def test_kaggles_results_without_lists_are_train_and_say_so(tmp_path):
    kaggle(tmp_path, "2199200615.jpg", "7.jpg")
    source = read_source(tmp_path)
    assert {r.key: len(r.captions) for r in source.records} == {"2199200615": 5, "7": 5}
    assert source.records[0].captions[4] == "Caption 4 of 2199200615.jpg ."
    assert source.splits == ("train",)
    assert any("all 2 images" in n and "they become train" in n for n in source.notes)
    assert source.rejected == ()


def test_split_lists_beside_kaggles_results_are_used(tmp_path):
    kaggle(tmp_path, "1.jpg", "2.jpg", "3.jpg", "4.jpg")
    for split, names in {"train": "1\n4", "val": "2", "test": "3"}.items():
        (tmp_path / f"{split}.txt").write_text(names)
    source = read_source(tmp_path)
    assert {r.key: r.split for r in source.records} == {
        "1": "train", "2": "val", "3": "test", "4": "train"
    }  # fmt: skip
    assert not any("become train" in note for note in source.notes)


def test_the_hubs_table_with_json_lists_and_splits(tmp_path):
    add_images(tmp_path / "flickr30k-images", "1.jpg", "2.jpg")
    with (tmp_path / "flickr_annotations_30k.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["raw", "sentids", "split", "filename", "img_id"])
        rows.writerow(
            [json.dumps(['A "dog", running', "Two\u2028lines"]), "[0, 1]", "train", "1.jpg", 0]
        )
        rows.writerow([json.dumps(["A cat"]), "[2]", "test", "2.jpg", 1])
    source = read_source(tmp_path)
    assert source.name == "flickr30k"
    assert {key: (r.split, r.captions) for key, r in by_key(source).items()} == {
        "1": ("train", ('A "dog", running', "Two\u2028lines")),
        "2": ("test", ("A cat",)),
    }


@pytest.mark.parametrize("through_recipe", [False, True])
def test_sources_that_disagree_about_the_images_are_both_named(tmp_path, through_recipe):
    render(tmp_path, SynthSettings(12, seed=0))
    names = [path.name for path in sorted((tmp_path / "images").iterdir())]
    rows = "".join(f"{name},A\n" for name in [*names[1:], "other.jpg"])
    (tmp_path / "captions.csv").write_text(f"image,caption\n{rows}")
    where = tmp_path
    if through_recipe:
        where = tmp_path / "r.yaml"
        where.write_text("captions: [dataset_flickr30k.json, captions.csv]\n")
    with pytest.raises(DataError, match=r"dataset_flickr30k\.json and .*captions\.csv disagree"):
        read_source(where)
    (tmp_path / "one.yaml").write_text("captions: dataset_flickr30k.json\n")
    assert len(read_source(tmp_path / "one.yaml").records) == 12


def test_a_source_with_more_images_gives_way_and_is_told_of(tmp_path):
    render(tmp_path, SynthSettings(12, seed=0))
    with (tmp_path / "results_20130124.token").open("a") as file:
        file.write("9.jpg#0\tNot in Karpathy's splits .\n")
    source = read_source(tmp_path)
    assert len(source.records) == 12
    assert any("describes 1 images more and is not used" in note for note in source.notes)


def coco(folder, split, *ids):
    add_images(folder / f"{split}2017", *(f"{i:012}.jpg" for i in ids))
    content = {
        "images": [{"id": i, "file_name": f"{i:012}.jpg"} for i in ids],
        "annotations": [{"image_id": i, "caption": f"A bus {n} ."} for i in ids for n in (1, 2)],
    }
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / f"captions_{split}2017.json").write_text(json.dumps(content))


def test_the_recipe_for_coco_takes_its_files_together(tmp_path):
    recipe = tmp_path / "coco.yaml"
    recipe.write_bytes((SHARDS / "coco.yaml").read_bytes())
    folder = tmp_path / "originals" / "coco"
    folder.mkdir(parents=True)
    coco(folder, "train", 1, 2, 3)
    coco(folder, "val", 4)
    source = read_source(recipe)
    assert source.name == "coco"
    assert {r.image_id: r.split for r in source.records} == {
        1: "train", 2: "train", 3: "train", 4: "val"
    }  # fmt: skip
    assert [r.image.is_file() for r in source.records] == [True] * 4
    coco(folder, "val", 3, 4)
    with pytest.raises(DataError, match=r"captions_train2017.* and .*captions_val2017.* image 3"):
        read_source(recipe)


def test_pictures_that_no_caption_file_names_have_no_caption(flickr8k):
    add_images(flickr8k / "images", "lost.jpg", "notes.txt.png")
    found = reasons(read_source(flickr8k))
    assert found["lost"] == found["notes_txt"] == "no caption"


def test_a_caption_that_is_not_utf_8_costs_itself_only(tmp_path):
    add_images(tmp_path / "images", "a.jpg")
    (tmp_path / "token.txt").write_bytes(b"a.jpg#0\tcaf\xe9\na.jpg#1\tA dog .\n")
    source = read_source(tmp_path)
    assert by_key(source)["a"].captions == ("A dog .",)
    assert reasons(source) == {"a#0": "caption not UTF-8"}


def test_recipes_are_yaml_1_2(tmp_path):
    add_images(tmp_path / "on", "a.jpg")
    (tmp_path / "no").write_text("a.jpg#0\tA dog .\n")
    (tmp_path / "r.yaml").write_text("name: off\nimages: on\ncaptions: no\n")
    assert read_source(tmp_path / "r.yaml").name == "off"


def test_one_tsv_of_any_name_is_enough(tmp_path):
    add_images(tmp_path / "images", "a.jpg", "b.jpg")
    (tmp_path / "pets.tsv").write_text(
        "image\tcaption\tlabel\tgroup\na.jpg\tA, b\tcat\tx\nb.jpg\tC\tdog\tx\n"
    )
    source = read_source(tmp_path)
    assert source.classes == ("cat", "dog")
    assert [(r.captions, r.label, r.group) for r in source.records] == [
        (("A, b",), 0, "x"),
        (("C",), 1, "x"),
    ]
    (tmp_path / "more.csv").write_text("image,caption\n")
    with pytest.raises(DataError, match=r"it holds more\.csv, pets\.tsv"):
        read_source(tmp_path)


def test_real_coco(test_data):
    (source,) = [read_source(test_data / "coco-cc")]
    assert (len(source.records), source.records[0].image_id is not None) == (20, True)
    assert all(len(record.captions) == 5 for record in source.records)


def test_real_flickr30k_captions(test_data, tmp_path):
    for file in (test_data / "flickr30k-captions").iterdir():
        (tmp_path / file.name).symlink_to(file)
    add_images(tmp_path / "images", "1000092795.jpg")
    source = read_source(tmp_path)
    counts = {s: sum(r.split == s for r in source.records) for s in source.splits}
    assert counts == {"train": 29_000, "val": 1_014, "test": 1_000}
    assert all(len(record.captions) == 5 for record in source.records)
    assert source.rejected == source.notes == ()
