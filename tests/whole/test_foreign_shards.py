"""Shards that other tools wrote, from `mmscale index` to the recall."""

import io
import json
import sys
import tarfile

import pytest
from PIL import Image

from tests.whole.command import TRAIN
from tests.whole.small_run import succeed, write_settings


def picture(number):
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (5 * number % 256, number, 9)).save(file, "PNG")
    return file.getvalue()


def write(path, samples):
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w") as tar:
        for key, number, text in samples:
            for ending, content in (("png", picture(number)), ("txt", text.encode())):
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.mark.slow
def test_lines_are_captions_and_copies_are_told_wherever_they_count(tmp_path):
    lines = [
        (f"{n:05d}", n, "".join(f"picture {n} view {j}\n" for j in range(5))) for n in range(40)
    ]
    write(tmp_path / "lines" / "0.tar", lines)
    write(tmp_path / "copies" / "0.tar", [(f"{n:05d}", n // 2, f"a {n}") for n in range(40)])
    told = succeed(["mmscale", "index", tmp_path / "lines"]).stderr
    assert "every txt has several lines; each line was taken as a caption" in told
    # Where the shards' own folder cannot be written.
    place = tmp_path / "made" / "here"
    told = succeed(["mmscale", "index", f"{tmp_path}/copies/*.tar", "--out", place]).stderr
    line = "20 of 40 images have the bytes of another"
    assert line in told
    assert "data.match=caption" in told
    run_dir = tmp_path / "run"
    words = [f"data.train={place}", f"data.eval={place}", "train.duration=2 steps"]
    words += ["checkpoint.every=2 steps", f"run.dir={run_dir}"]
    done = succeed([sys.executable, TRAIN, write_settings(tmp_path), *words], timeout=200)
    said = done.stdout + done.stderr
    assert f"data.train: {line}" in said
    assert f"data.eval: {line}" in said
    figures = tmp_path / "figures.json"
    evaluation = ["mmscale", "eval", run_dir, "--data", tmp_path / "lines", "--json", figures]
    assert "have the bytes" not in succeed(evaluation, timeout=200).stderr
    found = json.loads(figures.read_text())
    assert (found["images"], found["captions"]) == (40, 200)


def test_members_are_named_on_the_command_line(tmp_path):
    write(tmp_path / "s" / "0.tar", [(f"{n:05d}", n, f"a {n}") for n in range(4)])
    keys = "{image: ['*'], text: [txt]}"
    done = succeed(["mmscale", "index", tmp_path / "s", "--keys", keys])
    assert "4 images" in done.stdout
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert (manifest["version"], manifest["keys"]["text"]) == (3, ["txt"])
