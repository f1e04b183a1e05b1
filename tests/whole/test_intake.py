"""Two ranks on a table of pairs: one of them packs it, and the run is that of the packed folder."""

import csv
import json
import shutil

import pytest

from tests.whole.small_run import ALONE, course, succeed, torchrun, write_settings

pytestmark = pytest.mark.slow


def table(synthetic, folder):
    """The training images of the synthetic pairs, beside a table of them."""
    shutil.copytree(synthetic.source / "images", folder / "images")
    content = json.loads((synthetic.source / "dataset_flickr30k.json").read_text("utf-8"))
    with (folder / "photos.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["filepath", "title"])
        for image in content["images"]:
            writer.writerows([image["filename"], s["raw"]] for s in image["sentences"])
    return folder / "photos.csv"


def test_two_ranks_on_a_table_and_a_resume(synthetic, tmp_path):
    photos, settings = table(synthetic, tmp_path / "mine"), write_settings(tmp_path)
    words = [settings, f"data.train={photos}", "data.hold_out=0.2", f"run.dir={tmp_path / 'run'}"]
    first = succeed([*torchrun(), *words, "train.duration=4 steps"], timeout=240)
    assert first.stderr.count("is packed once, its split train into") == 1
    assert first.stderr.count("is packed once, its split val into") == 1
    (entry,) = (tmp_path / "mine" / ".mmscale").iterdir()
    again = succeed([*torchrun(), *words, "train.duration=8 steps"], timeout=240)
    assert "is packed once" not in again.stderr
    assert again.stderr.count(f"packed before, at {entry / 'train'}") == 1
    packed = [f"data.train={entry / 'train'}", f"run.dir={tmp_path / 'packed'}"]
    succeed([*ALONE, settings, *packed, "train.duration=8 steps"], timeout=240)
    digests = [{s: d for s, (_, d) in course(tmp_path / r).items()} for r in ("run", "packed")]
    assert digests[0] == digests[1]
