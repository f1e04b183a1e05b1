"""Lists of captions in every notation that tools leave behind."""

import io
import json
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmscale.data.caption_text import MOST_CAPTIONS, captions_in, listed, named_captions
from mmscale.data.index import index
from mmscale.data.manifest import read_manifest
from mmscale.data.reader import SampleReader
from mmscale.data.shards import open_shards
from mmscale.data.verify import verify
from mmscale.errors import DataError

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1)


@settings(deadline=None)
@given(TEXTS)
def test_a_list_is_read_back_from_json_and_from_python(texts):
    assert listed(json.dumps(texts)) == texts
    assert listed(json.dumps(texts, ensure_ascii=False)) == texts
    assert listed(str(texts)) == texts
    assert listed(str(tuple(texts))) == texts


@settings(deadline=None)
@given(st.lists(st.text(st.characters(categories=["L", "N", "P", "Zs"]), min_size=1), min_size=2))
def test_numpys_arrays_keep_their_texts_apart(texts):
    with np.printoptions(linewidth=40, threshold=10**6):
        assert listed(str(np.array(texts, dtype=object))) == texts
        assert listed(repr(np.array(texts, dtype=object))) == texts


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('{"a dog","a, cat"}', ["a dog", "a, cat"]),
        ("['it\\'s', \"a 'b'\"]", ["it's", "a 'b'"]),
        ("[u'a', u'b']", ["a", "b"]),
        (" [ 'a' ,\n 'b' ] ", ["a", "b"]),
        ("['a', 'b',]", ["a", "b"]),
        ("[dog] runs", None),
        ("[a dog, a cat]", None),
        ("(a dog)", None),
        ('["a", ', None),
        ("[1, 2]", None),
        ("['a', 2]", None),
        ("[__import__('os').system('true')]", None),
        ("['a' + 'b']", None),
        ("[" * 5000 + "]" * 5000, None),
        ("", None),
        ("[]", []),
    ],
)
def test_what_is_a_list_and_what_is_a_caption(text, wanted):
    assert listed(text) == wanted


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"captions": ["a", "b"]}, ["a", "b"]),
        ({"captions": "a dog"}, ["a dog"]),
        ({"captions": "['a', 'b']"}, ["a", "b"]),
        ({"captions": [["a"], ["b", "c"]]}, ["a", "b", "c"]),
        ({"caption": "a"}, ["a"]),
        ({"text": ["a", "b"]}, ["a", "b"]),
        ({"texts": ["a"]}, ["a"]),
        ({"sentences": [{"raw": "a", "tokens": ["a"]}, {"raw": "b"}]}, ["a", "b"]),
        ({"captions": [{"caption": "a", "id": 3}]}, ["a"]),
        ({"caption_0": "a", "caption_1": "b", "caption_10": "c", "caption_2": "d"}, list("abdc")),
        ({"caption": None, "text": "a"}, ["a"]),
        ({"captions": [], "caption": "a"}, ["a"]),
        ({"width": 3, "url": "http://x"}, []),
        ({"captions": ["a", 3]}, ["a", 3]),
    ],
)
def test_names_under_which_captions_stand(fields, wanted):
    assert named_captions(fields) == wanted


def test_no_more_are_taken_than_tell_that_there_are_too_many():
    assert len(captions_in(["a"] * 10**6)) == MOST_CAPTIONS + 1


def picture(number):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


def shard(path, samples):
    """A tar of samples, each a list of (ending, content)."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, members in enumerate(samples):
            for ending, content in [("png", picture(number % 256)), *members]:
                content = content if isinstance(content, bytes) else content.encode()
                info = tarfile.TarInfo(f"{number:05d}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def read(folder):
    shards = open_shards("data.eval", str(folder))
    reader = SampleReader(shards)
    found = [
        reader.read(number, sample).captions
        for number, record in enumerate(shards.shards)
        for sample in range(record.samples)
    ]
    reader.close()
    return found


def lines(number):
    return f" first {number}\n\nsecond {number} \r\n third {number}\n"


def test_texts_of_several_lines_are_read_by_line_where_all_are(tmp_path):
    shard(tmp_path / "s" / "0.tar", [[("txt", lines(n))] for n in range(3)])
    shard(tmp_path / "s" / "1.tar", [[("txt", lines(n))] for n in range(2)] + [[("txt", "one")]])
    shard(tmp_path / "s" / "2.tar", [[("txt", json.dumps(["a", "b"]))], [("txt", "['c' 'd']")]])
    shard(tmp_path / "s" / "3.tar", [[("txt", lines(0)), ("json", '{"captions": ["x", "y"]}')]])
    told = []
    manifest = index(sorted((tmp_path / "s").glob("*.tar")), tell=told.append)
    assert [list(record.captions) for record in manifest.shards] == [[3] * 3, [1] * 3, [2, 2], [2]]
    by_line = [(f"first {n}", f"second {n}", f"third {n}") for n in range(3)]
    whole = [(lines(n),) for n in range(2)]
    assert read(tmp_path / "s") == [*by_line, *whole, ("one",), ("a", "b"), ("c", "d"), ("x", "y")]
    assert verify(tmp_path / "s") == []
    assert any("0.tar: every txt has several lines; each line was taken" in line for line in told)
    assert any("1.tar: some txt have several lines" in line for line in told)
    assert not any("2.tar: " in line or "3.tar: " in line for line in told)


def test_a_byte_order_mark_is_no_caption_and_a_separator_no_line(tmp_path):
    texts = ["\ufeffa dog", "one\u2028caption\x0bonly"]
    index([shard(tmp_path / "s" / "0.tar", [[("txt", text)] for text in texts])])
    assert read(tmp_path / "s") == [("a dog",), (texts[1],)]


@pytest.mark.parametrize(
    ("description", "text", "wanted"),
    [
        ({"caption": "a"}, None, ("a",)),
        ({"caption": ["a", "b"]}, "a", ("a", "b")),
        ({"caption": "other", "url": "x"}, "text", ("text",)),
        ({"captions": "a text"}, "text", ("a text",)),
    ],
)
def test_json_beside_text(tmp_path, description, text, wanted):
    members = [("json", json.dumps(description))] + ([] if text is None else [("txt", text)])
    index([shard(tmp_path / "s" / "0.tar", [members])])
    assert read(tmp_path / "s") == [wanted]


def test_json_without_a_known_key_names_those_it_has(tmp_path):
    members = [("json", '{"url": "x", "alt": "a dog"}')]
    with pytest.raises(DataError, match="its json has url, alt; name it captions, caption"):
        index([shard(tmp_path / "s" / "0.tar", [members])])


def test_an_image_with_very_many_captions_is_left_out(tmp_path):
    many = json.dumps({"captions": ["a"] * 500_001})
    path = shard(tmp_path / "s" / "0.tar", [[("txt", "a")], [("json", many)], [("txt", "b")]])
    told = []
    index([path], skipped=told.append)
    assert read_manifest(tmp_path / "s").captions == 2
    assert any(f"has more than {MOST_CAPTIONS} captions" in line for line in told)
