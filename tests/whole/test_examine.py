"""`mmscale examine` on shards: what it tells, writes, and ends with."""

import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from mmscale.cli import entry
from mmscale.data.index import index
from mmscale.data.mask import masked, read_mask
from mmscale.data.shards import open_shards
from mmscale.diagnostics.dataset.copies import SIDE
from mmscale.diagnostics.dataset.verdict import Looks
from mmscale.errors import DataError, explained
from mmscale.evaluation.examine import examine, grey_of
from mmscale.report.examined import write_examined
from mmscale.sweep.prove import Proof
from tests.whole.browser import CHROMIUM, Browser
from tests.whole.command import explain, run
from tests.whole.small_run import write_settings
from tests.whole.test_foreign_shards import picture, write


@pytest.mark.slow
def test_blank_images_and_those_of_the_evaluation_set_are_told(tmp_path):
    write(tmp_path / "data" / "0.tar", [(f"{n:05d}", n, f"a picture {n}") for n in range(8)])
    write(tmp_path / "held" / "0.tar", [(f"x{n:04d}", n, f"a picture {n}") for n in range(6, 10)])
    for name in ("data", "held"):
        index([tmp_path / name / "0.tar"])
    words = ["--against", tmp_path / "held", "--workers", "1", "--json", tmp_path / "found.json"]
    words += ["--out", tmp_path / "told"]
    done = run(["mmscale", "examine", tmp_path / "data", *words])
    assert done.returncode == 3, explain(done)
    found = json.loads((tmp_path / "found.json").read_text("utf-8"))
    # Each is of one colour; numbers 6 and 7 have the bytes of the other set's.
    assert [(one["verdict"], one["share"]) for one in found["verdicts"]] == [
        ("leakage", 0.5),
        ("broken_images", 1.0),
    ]
    assert found["verdicts"][0]["examples"][0]["partner"] == "x0006"
    assert found["ceiling"]["t2i_r1"] == 100
    assert "2 of 4 evaluation images show a picture of the data" in done.stdout
    page = (tmp_path / "told" / "examined.html").read_text("utf-8")
    # Those of the data and, of the leak, those of the other set.
    assert page.count('class="photo" src="data:image/webp') == 2 * 2 + 8
    assert "told/mask.json leaves 8 images out" in done.stdout


@pytest.mark.slow
def test_towers_that_settings_name_look_at_the_pairs_once(synthetic, tmp_path):
    """The captions are longer than this tower's 8 tokens; features that are kept are used again."""
    words = [write_settings(tmp_path), "model.text.options.context_length=8"]
    words = ["mmscale", "examine", synthetic.train, *words, "--json", tmp_path / "found.json"]
    for is_first in (True, False):
        done = run(words, env={"XDG_CACHE_HOME": str(tmp_path / "cache")})
        assert done.returncode == 3, explain(done)
        assert ("images through the frozen towers, once" in done.stderr) == is_first
    assert "too few" not in done.stdout
    (verdict,) = json.loads((tmp_path / "found.json").read_text("utf-8"))["verdicts"]
    assert verdict["verdict"] == "cut_captions"
    assert "more than 8 tokens" in verdict["sentence"]
    assert verdict["held_out"] is None


def test_what_examine_cannot_use_is_told_with_its_exit_code(
    synthetic, tmp_path, monkeypatch, capsys
):
    sets = tmp_path / "sets.yaml"
    sets.write_text(f"pets: {{data: {synthetic.val}, kind: classes, classes: imagenet}}", "utf-8")
    for words, code, sentence in (
        ([tmp_path / "nothing"], 4, "nothing"),
        ([synthetic.train, "--sets", sets], 2, "is of kind classes"),
        ([synthetic.train, "--model", tmp_path / "no-run"], 2, "no such run"),
        ([synthetic.train, "model.vision.nome=x"], 2, "model.vision.nome"),
        ([synthetic.train, "--out", sets], 2, "--out"),
        ([synthetic.train, "demo", "--prove", "3"], 2, "name --out"),
        ([synthetic.train, "demo", "--out", tmp_path, "--prove", "1"], 2, "no interval"),
        (
            [
                synthetic.train,
                "flickr8k_finetune",
                "data.eval=null",
                "--out",
                tmp_path,
                "--prove",
                "2",
            ],
            2,
            "set data.eval",
        ),
    ):
        monkeypatch.setattr("sys.argv", ["mmscale", "examine", *map(str, words)])
        assert explained(entry._invoke) == code
        assert sentence in capsys.readouterr().err


def test_a_mask_names_ids_as_each_manifest_has_them(tmp_path, monkeypatch, capsys):
    """Two manifests, whose ids are told apart by what is combined with them; all are blank."""
    for name in ("a", "b"):
        samples = [(f"{n:05d}", n, f"a picture {n}") for n in range(4)]
        write(tmp_path / name / "0.tar", samples if name == "a" else samples[:3])
        index([tmp_path / name / "0.tar"])
    both = f"{tmp_path}/{{a,b}}/0.tar"
    words = ["mmscale", "examine", both, "--workers", "1", "--out", str(tmp_path / "page.html")]
    monkeypatch.setattr("sys.argv", words)
    assert explained(entry._invoke) == 3
    mask = read_mask(str(tmp_path / "mask.json"))
    assert sorted(len(ids) for ids in mask.within.values()) == [3, 4]
    one = open_shards("DATA", str(tmp_path / "b"))
    with pytest.raises(DataError, match="leaves no image"):
        masked(one, mask, print)
    assert "mask.json leaves 7 images out" in capsys.readouterr().out


EVIL = '<img src=x onerror="window.harm=1"><script>window.harm=1</script>\0\u202ebackwards'


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: tools/install-system-packages.sh")
def test_the_page_shows_pictures_and_hostile_captions_as_text(synthetic, tmp_path):
    shards = open_shards("DATA", str(synthetic.val))
    count, numbers = 24, np.arange(24)
    draws = np.random.default_rng(0)
    greys = draws.integers(0, 255, (count, SIDE, SIDE)).astype(np.uint8)
    # Half the captions are one wording, the first image has a copy, and one is broken.
    digests = [b"copy" if row < 2 else b"%d" % row for row in range(count)]
    faults = [EVIL if row == 5 else "" for row in range(count)]
    captions = [(EVIL,) if row % 2 else (f"scene {row}",) for row in range(count)]
    looks = Looks([EVIL] * count, numbers, numbers, digests, faults, greys, captions)
    page = tmp_path / "page.html"
    write_examined(page, examine(looks, {}, 8), shards, {}, EVIL)
    (tmp_path / "profile").mkdir()
    with Browser(tmp_path / "profile") as browser:
        for width, dark in ((1280, False), (390, True)):
            browser.open(page, width, 900, dark)
            badges = browser.value("[...document.querySelectorAll('.badge')].map(b => b.innerText)")
            assert badges == ["near_duplicates", "repeated_captions", "broken_images"]
            pictures = browser.value("[...document.images].map((i) => i.naturalWidth)")
            assert len(pictures) == 2 + 1 + 1
            assert all(pictures)
            assert browser.value("document.documentElement.scrollWidth") <= width
            legible = EVIL.replace("\0", "").replace("\u202e", "")
            assert browser.value("document.querySelector('h1').innerText.trim()") == legible
            assert browser.value("window.harm") is None
            assert browser.complaints == []


@pytest.mark.slow
def test_a_mask_is_proved_by_training_with_it_and_without(synthetic, tmp_path):
    """Four runs of two updates: their figures say nothing, but agree."""
    source = tmp_path / "pairs"
    source.mkdir()
    lines = ["image,caption"]
    for number, path in enumerate(sorted((synthetic.source / "images").iterdir())[:64]):
        shutil.copy(path, source)
        lines.append(f"{path.name},a scene {number}")
    for number in range(3):
        (source / f"{number}.png").write_bytes(picture(number))
        lines.append(f"{number}.png,a blank {number}")
    (source / "pairs.csv").write_text("\n".join(lines), "utf-8")
    out = tmp_path / "packed"
    packed = run(["mmscale", "pack", source / "pairs.csv", "--out", out])
    assert packed.returncode == 0, explain(packed)
    words = [write_settings(tmp_path), f"data.eval={synthetic.val}", "train.duration=2 steps"]
    words += ["--out", tmp_path / "told", "--prove", "2", "--json", tmp_path / "found.json"]
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = run(["mmscale", "examine", out / "train", *words], env=env, timeout=600)
    assert done.returncode == 3, explain(done)
    proof = json.loads((tmp_path / "found.json").read_text("utf-8"))["proof"]
    gains = [after - before for before, after in zip(proof["whole"], proof["masked"], strict=True)]
    assert proof["gain"] == pytest.approx(sum(gains) / 2)
    assert f"mean recall over 2 seeds changes by {proof['gain']:+.2f} points" in done.stdout
    said = (tmp_path / "told" / "prove" / "masked-1" / "stderr.txt").read_text("utf-8")
    assert "leaves out 3 of the 67 images of data.train" in said


def test_the_interval_of_a_gain_is_students():
    proof = Proof((10.0, 12.0, 11.0), (12.0, 13.0, 14.0))
    # Differences 2, 1, 3: mean 2, deviation 1; the quantile of two degrees of freedom is 4.303.
    assert proof.gain == 2
    assert proof.interval == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))


def test_a_source_is_looked_at_where_it_is_trained_on_and_as_training_reads_it(synthetic, tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(synthetic.source, folder)
    found = tmp_path / "found.json"
    done = run(["mmscale", "examine", folder, "--json", found])
    assert json.loads(found.read_text())["images"] == 96, explain(done)
    values = np.linspace(0, 65535, 64 * 64, dtype=np.uint16).reshape(64, 64)
    kept = io.BytesIO()
    Image.fromarray(values).save(kept, "PNG")
    grey, fault = grey_of(kept.getvalue())
    assert not fault
    assert grey.std() > 50
