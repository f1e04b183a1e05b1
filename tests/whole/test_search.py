"""`mmscale search` over rendered scenes: what brute force finds, kept embeddings, and a page."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

import mmscale
import mmscale.cli.entry
from mmscale.cli.command import app
from mmscale.data.images import open_images
from mmscale.evaluation.image_index import IndexPlace, index_of
from mmscale.evaluation.search import Found, found_in, query_row
from mmscale.evaluation.trained import load_trained
from mmscale.report.found import write_found
from tests.unit.model.test_openclip_weights import write_clip
from tests.whole.browser import CHROMIUM, Browser
from tests.whole.command import run
from tests.whole.small_run import ALONE, succeed, words_for, write_settings

QUERIES = 50
EVIL = '<img src=x onerror="window.harm=1"><script>window.harm=1</script>\0\u202ebackwards'


@pytest.fixture(scope="module")
def trained(synthetic, tmp_path_factory):
    folder = tmp_path_factory.mktemp("searched")
    words = words_for(synthetic, write_settings(folder))
    succeed([*ALONE, *words, "train.duration=10 steps", f"run.dir={folder / 'run'}"])
    return folder / "run"


def by_hand(shards, model, transform):
    """Keys, captions and unit rows of every image, with a plain tar reader and a loop."""
    keys, captions, rows = [], [], []
    for shard in sorted(shards.glob("*.tar")):
        with tarfile.open(shard) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for name in sorted(name for name in members if name.endswith(".jpg")):
            pixels = transform(Image.open(io.BytesIO(members[name])))
            keys.append(name.removesuffix(".jpg"))
            captions.append(json.loads(members[f"{keys[-1]}.json"])["captions"])
            with torch.no_grad():
                rows.append(model.encode_image(pixels[None], normalize=True)[0])
    return keys, captions, torch.stack(rows)


def test_every_caption_finds_what_brute_force_finds(synthetic, trained, tmp_path):
    model, transform, tokenizer = mmscale.load(trained)
    keys, captions, rows = by_hand(synthetic.train, model, transform)
    ours, images = load_trained(trained), open_images("--data", str(synthetic.train))
    index = index_of(ours, images, IndexPlace(tmp_path / "index", True), lambda line: None)
    asked = [caption for entry in captions for caption in entry][:QUERIES]
    assert len(asked) == QUERIES
    told: list[str] = []
    for words in asked:
        with torch.no_grad():
            query = model.encode_text(tokenizer([words]), normalize=True)[0]
        scores = (rows.double() @ query.double()).tolist()
        expected = sorted(range(len(keys)), key=lambda row: -scores[row])[:10]
        found = found_in(index, query_row(ours, words, None, told.append), 10)
        assert [one.key for one in found] == [keys[row] for row in expected]
        assert [one.score for one in found] == pytest.approx(
            [scores[row] for row in expected], abs=1e-6
        )
        assert [list(one.captions) for one in found] == [captions[row] for row in expected]


def search(*words):
    assert not app(["search", *map(str, words)], standalone_mode=False)


def test_the_command_prints_writes_and_draws_and_encodes_once(synthetic, trained, tmp_path, capsys):
    words = [trained, "--data", synthetic.val, "a", "red circle", "data.workers=0", "--top", "3"]
    search(*words, "--json", tmp_path / "found.json", "--out", tmp_path / "page.html")
    done = capsys.readouterr()
    assert "24 images are encoded" in done.err
    found = json.loads((tmp_path / "found.json").read_text("utf-8"))
    assert [set(entry) for entry in found] == [{"key", "score", "captions"}] * 3
    assert found == sorted(found, key=lambda entry: -entry["score"])
    for rank, entry in enumerate(found, 1):
        assert f"{rank} {entry['score']:.4f} {entry['key']}\n" in done.out
        assert all(f"    {caption}\n" in done.out for caption in entry["captions"])
    page = (tmp_path / "page.html").read_text("utf-8")
    assert page.count('src="data:image/webp;base64,') == 3
    assert "The 3 closest of 24 images" in page
    assert len(list((trained / "search").iterdir())) == 1

    search(*words, "--json", tmp_path / "again.json")
    assert "encoded" not in capsys.readouterr().err
    assert json.loads((tmp_path / "again.json").read_text("utf-8")) == found


def test_a_model_of_others_is_searched_by_any_name(synthetic, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    clip = tmp_path / "clip"
    write_clip(clip, {})
    found = []
    for name in (clip, f"openclip:local-dir:{clip}"):
        words = [name, "--data", synthetic.source / "images", "a star", "data.workers=0"]
        search(*words, "--json", tmp_path / "found.json")
        found.append(json.loads((tmp_path / "found.json").read_text("utf-8")))
    assert found[0] == found[1]
    assert [entry["captions"] for entry in found[0]] == [[]] * 10
    # One model, one index.
    assert len(list((tmp_path / "cache" / "mmscale" / "search").iterdir())) == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--data", "x"], "nothing to look for"),
        (["--data", "x", "a dog", "--out", "page.txt"], "--out page.txt"),
    ],
)
def test_a_wrong_command_is_refused_at_once(tmp_path, words, told):
    done = run(["mmscale", "search", tmp_path, *words], cwd=tmp_path)
    assert done.returncode == 2
    assert told in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: tools/install-system-packages.sh")
def test_a_page_shows_photographs_and_hostile_captions_as_text(synthetic, tmp_path):
    images = open_images("--data", str(synthetic.val))
    found = [Found(place, EVIL, 0.5, (EVIL, "a dog")) for place in range(5)]
    page = tmp_path / "page.html"
    picture = next((synthetic.source / "images").iterdir())
    write_found(page, found, images, EVIL, picture, model=EVIL, data=EVIL, searched=24)
    (tmp_path / "profile").mkdir()
    with Browser(tmp_path / "profile") as browser:
        for width, dark in ((1280, False), (390, True)):
            browser.open(page, width, 900, dark)
            pictures = browser.value("[...document.images].map((i) => i.naturalWidth)")
            assert len(pictures) == 6
            assert all(pictures)
            assert browser.value("document.documentElement.scrollWidth") <= width
            legible = EVIL.replace("\0", "").replace("\u202e", "")
            assert browser.value("document.querySelector('h1').innerText.trim()") == legible
            assert browser.value("document.querySelector('li').innerText.trim()") == legible
            assert browser.value("window.harm") is None
            assert browser.complaints == []


def test_what_lies_behind_the_page_may_be_gone(synthetic, tmp_path):
    """A photograph that can no longer be decoded leaves its place empty."""
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(next((synthetic.source / "images").iterdir()).read_bytes())
    images = open_images("--data", str(tmp_path))
    (tmp_path / "a.jpg").write_bytes(b"")
    found = [Found(0, "a.jpg", 0.5, ()), Found(1, "b.jpg", 0.4, ())]
    page = Path(tmp_path / "page.html")
    write_found(page, found, images, "a dog", None, model="m", data="d", searched=2)
    assert page.read_text("utf-8").count("no picture") == 1
