"""Runs on pairs as they lie: a table that one of two ranks packs, a data set of the hub."""

import csv
import io
import json
import shutil

import pytest
from PIL import Image

from mmscale.data.manifest import read_manifest
from mmscale.data.pack import pack
from tests.hub import TOKEN, running_hub
from tests.whole.command import explain, run
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
    with photos.open("r+", newline="") as file:
        rows = list(csv.reader(file))
        rows[1][1] += " again"
        file.seek(0)
        csv.writer(file).writerows(rows)
    told = run([*ALONE, *words, "train.duration=12 steps"], timeout=240)
    assert told.returncode == 2, explain(told)
    assert "is not what was packed at" in told.stderr
    (line,) = (line for line in told.stderr.splitlines() if line.startswith("mmscale: "))
    assert f"data.train={photos} holds other shards" in line
    assert "restore them, or start another run.dir" in line


def parquet(first, count, side=32):
    """Bytes of a table as the hub's data sets hold them: images in it, and a caption each."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = []
    for number in range(first, first + count):
        file = io.BytesIO()
        Image.new("RGB", (side, side), (number, 99, 255 - number)).save(file, "PNG")
        image = {"bytes": file.getvalue(), "path": f"{number:03d}.png"}
        rows.append({"image": image, "caption": f"picture number {number}"})
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


@pytest.fixture
def hub(tmp_path):
    pytest.importorskip("datasets")
    with running_hub() as running:
        running.files["datasets/org/pairs", "main"] = {
            "data/train-00000-of-00001.parquet": parquet(0, 64),
            "data/validation-00000-of-00001.parquet": parquet(64, 24),
        }
        yield running


def test_a_data_set_of_the_hub_by_its_name_is_packed_and_trained_on(hub, tmp_path):
    for name, content in hub.files["datasets/org/pairs", "main"].items():
        (tmp_path / "local" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "local" / name).write_bytes(content)
    env = hub.environment(tmp_path / "cache") | {"XDG_CACHE_HOME": str(tmp_path / "xdg")}
    hub.private.add("datasets/org/pairs")
    succeed(["mmscale", "pack", "hf:org/pairs", "--out", tmp_path / "named"], env=env)
    pack(tmp_path / "local", tmp_path / "packed")
    shards = [
        [read_manifest(tmp_path / made / split).shards for split in ("train", "val")]
        for made in ("named", "packed")
    ]
    own = [[[len(shard.offsets) for shard in split] for split in made] for made in shards]
    assert own == [[[64], [24]]] * 2
    words = [*ALONE, write_settings(tmp_path), "data.train=hf:org/pairs", "data.eval=hf:org/pairs"]
    words += [f"run.dir={tmp_path / 'run'}"]
    first = succeed([*words, "train.duration=4 steps"], env=env, timeout=240)
    assert first.stderr.count("is packed once") == 2, explain(first)
    again = succeed([*words, "train.duration=6 steps"], env=env, timeout=240)
    assert "is packed once" not in again.stderr
    # The owner pushes other pictures: another commit.
    hub.commits["org/pairs"] = "d" * 40
    hub.files["datasets/org/pairs", "main"]["data/train-00000-of-00001.parquet"] = parquet(100, 64)
    told = run([*words, "train.duration=8 steps"], env=env, timeout=240)
    assert told.returncode == 2, explain(told)
    assert "data.train=hf:org/pairs holds other shards" in told.stderr
    assert TOKEN not in told.stderr


@pytest.mark.parametrize("name", ["hf:org/absent", "hf:org/pairs@v9"])
def test_a_data_set_that_is_not_there_is_one_sentence(hub, tmp_path, name):
    env = hub.environment(tmp_path / "cache") | {"XDG_CACHE_HOME": str(tmp_path / "xdg")}
    words = [*ALONE, write_settings(tmp_path), f"data.train={name}", f"run.dir={tmp_path / 'run'}"]
    told = run(words, env=env, timeout=240)
    assert told.returncode == 4, explain(told)
    (line,) = (line for line in told.stderr.splitlines() if line.startswith("mmscale: "))
    assert name in line
