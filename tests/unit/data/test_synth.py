import json
import re

import pytest
from PIL import Image

from mmscale.data.scenes import COLOURS, SHAPES, draw_scene
from mmscale.data.synth import SynthSettings, describe_scene, image_name, render
from mmscale.errors import ConfigError


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def entries(folder):
    return json.loads((folder / "dataset_flickr30k.json").read_text())["images"]


def raw(entry):
    return [sentence["raw"] for sentence in entry["sentences"]]


def test_same_seed_same_bytes_at_any_number_of_workers(tmp_path):
    render(tmp_path / "a", SynthSettings(140, seed=3))
    render(tmp_path / "b", SynthSettings(140, seed=3), workers=2)
    render(tmp_path / "c", SynthSettings(140, seed=4))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


def test_layout_is_flickr30ks(tmp_path):
    render(tmp_path, SynthSettings(36, seed=0))
    lines = (tmp_path / "results_20130124.token").read_text().splitlines()
    assert len(lines) == 180
    assert all(re.fullmatch(r"\d+\.jpg#[0-4]\t\S.+", line) for line in lines)
    images = entries(tmp_path)
    assert [e["split"] for e in images] == ["train"] * 30 + ["val"] * 3 + ["test"] * 3
    assert {e["filename"] for e in images} == {p.name for p in (tmp_path / "images").iterdir()}
    assert [f"{e['filename']}#{i}\t{c}" for e in images for i, c in enumerate(raw(e))] == lines
    assert [s["sentid"] for e in images for s in e["sentences"]] == list(range(180))
    assert all(e["label_name"] == SHAPES[e["label"]] for e in images)
    with Image.open(tmp_path / "images" / images[0]["filename"]) as image:
        assert (image.format, image.size) == ("JPEG", (96, 96))


def test_names_differ_for_every_index():
    assert len({image_name(5, index) for index in range(50_000)}) == 50_000


def things_named(caption):
    """(colour, shape) of every thing that a caption names, in either word order."""
    colours, shapes = "|".join(COLOURS), "|".join(SHAPES)
    found = set(re.findall(rf"({colours}) ({shapes})\b", caption.lower()))
    for shape, colour in re.findall(
        rf"the ({shapes}) [^;]*? (?:large|big|small|little) and ({colours})\b", caption.lower()
    ):
        found.add((colour, shape))
    return found


def test_five_differing_captions_name_every_thing_and_nothing_else():
    for index in range(300):
        scene = draw_scene(0, index)
        captions = describe_scene(scene, f"0/{index}")
        assert len(set(captions)) == 5
        for caption in captions:
            assert things_named(caption) == {(t.colour, t.shape) for t in scene.things}, caption


def test_relations_are_true():
    checked = 0
    for index in range(300):
        scene = draw_scene(1, index)
        where = {(t.colour, t.shape): t for t in scene.things}
        for caption in describe_scene(scene, f"1/{index}"):
            if " is " not in caption or ";" in caption or "The" in caption:
                continue
            first, rest = caption.lower().split(" is ", 1)
            (subject,) = (where[name] for name in things_named(first))
            for word, colour, shape in re.findall(
                r"(left of|right of|above|below) an? (?:\w+) (\w+) (\w+)", rest
            ):
                other = where[colour, shape]
                truth = {
                    "left of": subject.column < other.column,
                    "right of": subject.column > other.column,
                    "above": subject.row < other.row,
                    "below": subject.row > other.row,
                }
                assert truth[word], (scene, caption)
                checked += 1
    assert checked > 100


def cells_named(caption):
    """Grid cells that a caption names."""
    rows = {"top": 0, "upper": 0, "bottom": 2, "lower": 2}
    columns = {"left": 0, "centre": 1, "right": 2}
    words = re.sub(r"to the (left|right) of", "", caption.lower())
    found = set()
    for row, column, side, middle in re.findall(
        r"\b(top|upper|bottom|lower) (left|right|centre)|(left|right) side|(centre|middle)", words
    ):
        found.add(4 if middle else 3 + columns[side] if side else 3 * rows[row] + columns[column])
    return found


def fits(caption, scene):
    """Whether all that a caption says of things, sizes, places and background holds for a scene."""
    if things_named(caption) != {(t.colour, t.shape) for t in scene.things}:
        return False
    words = caption.lower()
    cells = cells_named(caption)
    tone = re.search(r"(dark|grey|pale) background", words)
    return (
        len(re.findall(r"\b(?:large|big)\b", words)) == sum(t.large for t in scene.things)
        and (not cells or cells == {t.cell for t in scene.things})
        and (tone is None or tone[1] == scene.tone)
    )


def test_captions_are_true_and_tell_their_scene_among_five_hundred():
    scenes = [draw_scene(0, index) for index in range(500)]
    alone = []
    for index, scene in enumerate(scenes):
        captions = describe_scene(scene, f"0/{index}")
        assert all(fits(caption, scene) for caption in captions), captions
        alone.append(sum(fits(captions[0], other) for other in scenes) == 1)
    assert sum(alone) >= 0.98 * len(alone)


def test_ambiguous_captions_still_hold_for_their_scene():
    for index in range(100):
        scene = draw_scene(0, index)
        captions = describe_scene(scene, f"0/{index}", ambiguity=1.0)
        assert len(set(captions)) == 5
        for caption in captions:
            words = set(re.findall("[a-z]+", caption.lower()))
            assert words & set(SHAPES) <= {t.shape for t in scene.things}
            assert words & set(COLOURS) <= {t.colour for t in scene.things}
            assert things_named(caption) != {(t.colour, t.shape) for t in scene.things} or (
                len(scene.things) == 1
            )


def test_mispaired_images_keep_their_pixels_and_tell_another_scene(tmp_path):
    render(tmp_path / "clean", SynthSettings(60, seed=0))
    render(tmp_path / "wrong", SynthSettings(60, seed=0, mispaired=0.5))
    wrong = 0
    for index, entry in enumerate(entries(tmp_path / "wrong")):
        told = things_named(raw(entry)[0])
        wrong += told != {(t.colour, t.shape) for t in draw_scene(0, index).things}
    assert wrong == 25 + 2 + 2
    for path in (tmp_path / "clean" / "images").iterdir():
        assert path.read_bytes() == (tmp_path / "wrong" / "images" / path.name).read_bytes()


def test_duplicates_show_one_scene_in_other_bytes_and_words(tmp_path):
    render(tmp_path, SynthSettings(60, seed=0, duplicates=0.2))
    images = entries(tmp_path)
    own = [
        things_named(raw(e)[0]) == {(t.colour, t.shape) for t in draw_scene(0, i).things}
        for i, e in enumerate(images)
    ]
    assert own.count(False) == 10 + 1 + 1
    assert len({p.read_bytes() for p in (tmp_path / "images").iterdir()}) == 60
    assert len({tuple(raw(e)) for e in images}) == 60


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"images": 2}, "images=2"),
        ({"images": 10, "val": 10}, "val=10"),
        ({"images": 10, "mispaired": 1.5}, "mispaired=1.5"),
        ({"images": 10, "size": 8}, "size=8"),
    ],
)
def test_numbers_that_make_no_data_set_are_refused(tmp_path, settings, word):
    with pytest.raises(ConfigError, match=word):
        render(tmp_path, SynthSettings(seed=0, **settings))
