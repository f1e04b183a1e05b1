"""Tables and annotations as people have them: any separator, encoding, paths, splits and lists."""

import csv
import io
import json
import shutil

import pytest
from PIL import Image

from mmscale.data.pack import PackSettings, pack
from mmscale.data.sources import read_source
from mmscale.errors import ConfigError, DataError


def picture(number):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256, 1)).save(file, "PNG")
    return file.getvalue()


def images(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        (folder / name).write_bytes(picture(number))


@pytest.fixture
def pairs(tmp_path):
    """Six pictures in `pairs/images`; gives a function that writes the table beside them."""
    folder = tmp_path / "pairs"
    images(folder / "images", [f"p{n}.png" for n in range(6)])

    def write(rows, name="captions.csv", encoding="utf-8", **form):
        file = io.StringIO(newline="")
        csv.writer(file, **form).writerows(rows)
        (folder / name).write_bytes(file.getvalue().encode(encoding))
        return folder

    write.folder = folder
    return write


ROWS = [["image", "caption"], *([f"p{n}.png", f"picture, {n}; größer"] for n in range(6))]
WANTED = [(f"p{n}", (f"picture, {n}; größer",)) for n in range(6)]


def read(path, **options):
    data = read_source(path, **options)
    return [(record.key, record.captions) for record in data.records]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_any_separator_and_encoding(pairs, separator, encoding):
    assert read(pairs(ROWS, encoding=encoding, delimiter=separator)) == WANTED


def test_excels_line_on_the_separator(pairs):
    folder = pairs(ROWS, delimiter=";")
    path = folder / "captions.csv"
    path.write_text("sep=;\n" + path.read_text())
    assert read(folder) == WANTED


def test_half_a_letter_of_utf_16_is_named(pairs):
    folder = pairs(ROWS, encoding="utf-16")
    path = folder / "captions.csv"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"is not whole utf-16.*save it as UTF-8"):
        read_source(folder)


@pytest.mark.parametrize("name", ["captions.csv", "my pairs [2].csv", "pairs.tsv", "words.txt"])
def test_the_table_itself_is_a_source(pairs, name):
    folder = pairs(ROWS, name)
    pairs([["image", "caption"], ["z.png", "another table"]], "other.csv")
    assert read(folder / name) == WANTED


def test_every_kind_of_caption_file_is_a_source(pairs):
    folder = pairs.folder
    lines = "".join(f"p{n}.png#0\tpicture, {n}; größer\n" for n in range(6))
    (folder / "mine.txt").write_text(lines, "utf-8")
    assert read(folder / "mine.txt") == WANTED
    content = {
        "images": [
            {"filename": f"p{n}.png", "split": "val", "sentences": [{"raw": f"picture {n}"}]}
            for n in range(6)
        ]
    }
    (folder / "mine.json").write_text(json.dumps(content))
    assert read_source(folder / "mine.json").splits == ("val",)
    with pytest.raises(DataError, match="neither a folder nor a caption file"):
        read_source(folder / "images" / "p0.png")


def test_absolute_paths_inside_the_folder_or_the_one_that_is_named(pairs, tmp_path):
    folder = pairs.folder
    rows = [["image", "caption"]]
    rows += [[str(folder / "images" / f"p{n}.png"), f"picture {n}"] for n in range(6)]
    pairs(rows)
    assert read(folder) == [(f"images_p{n}", (f"picture {n}",)) for n in range(6)]
    elsewhere = tmp_path / "tables"
    elsewhere.mkdir()
    shutil.move(folder / "captions.csv", elsewhere / "captions.csv")
    with pytest.raises(DataError, match="leaves the folder of images; name the folder"):
        read_source(elsewhere)
    wanted = [(f"p{n}", (f"picture {n}",)) for n in range(6)]
    assert read(elsewhere, images=folder / "images") == wanted
    assert read(elsewhere / "captions.csv", images=folder / "images") == wanted


def test_absolute_paths_do_not_lead_out(pairs, tmp_path):
    (tmp_path / "secret.png").write_bytes(picture(99))
    folder = pairs([*ROWS, [f"{pairs.folder}/images/../../secret.png", "A secret"],
                    [str(tmp_path / "secret.png"), "A secret"]])  # fmt: skip
    data = read_source(folder)
    assert [record.key for record in data.records] == [key for key, _ in WANTED]
    assert sum("leaves the folder" in one.reason for one in data.rejected) == 2


@pytest.mark.parametrize(
    "cell",
    [
        '["a dog", "a \'cat\'"]',
        "['a dog', \"a 'cat'\"]",
        "['a dog' \"a 'cat'\"]",
        "('a dog', \"a 'cat'\")",
        '{"a dog","a \'cat\'"}',
        "a dog\na 'cat'\n",
    ],
)
def test_several_captions_in_a_cell(pairs, cell):
    folder = pairs([["image", "captions"], *([f"p{n}.png", cell] for n in range(6))])
    data = read_source(folder)
    assert [record.captions for record in data.records] == [("a dog", "a 'cat'")] * 6
    assert any("every cell has several lines" in note for note in data.notes) == ("\n" in cell)


def test_cells_that_only_look_like_several_are_told(pairs):
    rows = [["image", "caption"], ["p0.png", "one\ntwo"], ["p1.png", "[a dog, a cat]"]]
    data = read_source(pairs([*rows, ["p2.png", "a dog"]]))
    assert [len(record.captions) for record in data.records] == [1, 1, 1]
    assert any("1 cells of several lines are one caption each" in note for note in data.notes)
    assert any("1 cells look like lists" in note for note in data.notes)


def test_the_first_true_fault_is_shown(pairs):
    folder = pairs.folder
    text = "image_name| comment_number| comment\n" + "".join(f"p{n}.png, 0, A\n" for n in range(3))
    (folder / "captions.csv").write_text(text)
    with pytest.raises(DataError, match=r"captions\.csv:2: is not NAME\| number\| caption"):
        read_source(folder)
    pairs([["image", "caption"], ["p0.png", "A", "B"], ["p1.png", "A", "B"]])
    with pytest.raises(DataError, match=r"first fault of 2: captions\.csv:2: has 3 cells"):
        read_source(folder)


def test_names_without_their_ending_get_a_hint(pairs):
    folder = pairs([["image", "caption"], *([f"p{n}", f"picture {n}"] for n in range(6))])
    with pytest.raises(DataError, match=r"none of the 6 images.*holds p0\.png: write names with"):
        read_source(folder)


def test_split_lists_name_images_with_their_folder_or_without(pairs):
    folder = pairs(
        [["image", "caption"], *([f"images/p{n}.png", f"picture {n}"] for n in range(6))]
    )
    (folder / "trainImages.txt").write_text("".join(f"p{n}.png\n" for n in range(4)))
    (folder / "valImages.txt").write_text("images/p4.png\nimages/p5.png\n")
    data = read_source(folder)
    assert [record.split for record in data.records] == ["train"] * 4 + ["val"] * 2
    assert data.rejected == ()


def coco(folder, splits):
    (folder / "annotations").mkdir(parents=True)
    for start, split in enumerate(splits):
        pictures = [{"id": 100 * start + n, "file_name": f"{start}{n}.png"} for n in range(10)]
        words = [{"image_id": 100 * start + n, "caption": f"picture {n}"} for n in range(10)]
        path = folder / "annotations" / f"captions_{split}2017.json"
        path.write_text(json.dumps({"images": pictures, "annotations": words}))
    return folder


def test_coco_with_the_images_of_one_split(tmp_path):
    folder = coco(tmp_path / "coco", ("train", "val"))
    images(folder / "val2017", [f"1{n}.png" for n in range(10)])
    told = []
    (result,) = pack(folder, tmp_path / "all", tell=told.append)
    assert (result.split, result.samples) == ("val", 10)
    assert any("left out:" in line and "captions_train2017.json" in line for line in told)
    (result,) = pack(folder, tmp_path / "one", PackSettings(split="val"))
    assert result.samples == 10
    with pytest.raises(DataError, match="has no split train; it has val"):
        pack(folder, tmp_path / "other", PackSettings(split="train"))
    shutil.rmtree(folder / "val2017")
    with pytest.raises(DataError, match=r"none of the 10 images that captions_train2017\.json"):
        pack(folder, tmp_path / "none")


def test_a_data_set_whose_images_are_mostly_missing_is_refused(tmp_path):
    folder = tmp_path / "pairs"
    images(folder / "images", [f"p{n}.png" for n in range(6)])
    rows = "".join(f"p{n}.png,picture {n}\n" for n in range(200))
    (folder / "captions.csv").write_text(f"image,caption\n{rows}")
    with pytest.raises(DataError, match=r"194 of 200 images of train are missing, first p6\.png"):
        pack(folder, tmp_path / "out")
    assert not (tmp_path / "out" / "train").exists()
    (result,) = pack(folder, tmp_path / "out", PackSettings(most_left_out=1))
    assert (result.samples, result.rejected) == (6, 194)


def test_a_data_set_that_is_mostly_web_pages_is_refused(tmp_path):
    folder = tmp_path / "pairs"
    images(folder / "images", [f"p{n}.png" for n in range(6)])
    rows = "".join(f"p{n}.png,picture {n}\n" for n in range(40))
    (folder / "captions.csv").write_text(f"image,caption\n{rows}")
    for n in range(6, 40):
        (folder / "images" / f"p{n}.png").write_bytes(b"<html>%d</html>" % n)
    with pytest.raises(DataError, match="34 of 40 images were rejected, more than"):
        pack(folder, tmp_path / "out")
    assert (tmp_path / "out" / "train" / "rejected.txt").is_file()
    (result,) = pack(folder, tmp_path / "out", PackSettings(most_left_out=1))
    assert (result.samples, result.rejected, result.kept) == (6, 34, 1)


def test_a_part_is_held_out_by_name(tmp_path):
    folder = tmp_path / "pairs"
    images(folder / "images", [f"p{n}.png" for n in range(40)])
    rows = [f"p{n}.png,picture {n},{n // 2}\n" for n in range(40)]
    (folder / "captions.csv").write_text("image,caption,group\n" + "".join(rows))
    told = []
    packed = pack(folder, tmp_path / "out", PackSettings(hold_out=0.1), tell=told.append)
    assert [(one.split, one.samples) for one in packed] == [("train", 36), ("val", 4)]
    assert told == ["4 of 40 images are held out as val, chosen by their names"]
    keys = {record.key for record in held(folder, 0.1)}
    # Images of one group stay together, whatever the order of the rows.
    assert {int(key[1:]) // 2 for key in keys} == {int(k[1:]) // 2 for k in keys if int(k[1:]) % 2}
    (folder / "captions.csv").write_text("image,caption,group\n" + "".join(reversed(rows)))
    assert {record.key for record in held(folder, 0.1)} == keys


def held(folder, share):
    from mmscale.data.sources.records import held_out

    return [one for one in held_out(read_source(folder), share).records if one.split == "val"]


def test_nothing_is_held_out_of_a_set_with_splits(pairs, tmp_path):
    rows = [
        ["image", "caption", "split"],
        *([f"p{n}.png", f"picture {n}", "dev"] for n in range(6)),
    ]
    with pytest.raises(ConfigError, match="says itself what is val"):
        pack(pairs(rows), tmp_path / "out", PackSettings(hold_out=0.5))
    pairs(ROWS)
    with pytest.raises(DataError, match="leaves nothing on one side"):
        pack(pairs.folder, tmp_path / "out", PackSettings(hold_out=0.01))
    told = []
    pack(pairs.folder, tmp_path / "out", tell=told.append)
    assert "no column `split`" in told[0]
    assert "--hold-out 0.1" in told[0]
