"""The decoded cache: the same rows with and without it, bounded, and never stale."""

import fcntl
import io
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import islice
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmscale.contracts import InputSpec, Position, World
from mmscale.data import decoded_cache
from mmscale.data.damage import DamagedSampleError
from mmscale.data.decoded_cache import DecodedCache, Shrinking
from mmscale.data.pixels import EvalTransform, TrainTransform, decode, open_picture
from mmscale.data.schedule import plan_schedule
from mmscale.data.shards import open_shards
from mmscale.data.stream import TrainStream

SPEC = InputSpec(
    image_size=32,
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
    interpolation="bicubic",
    tokenize=lambda captions: [[1, 2] for _ in captions],
    pad_token=0,
    context_length=8,
)
PLENTY = 1e9
SEEDS = range(4)


def photograph(number, width=150, height=90, form="JPEG"):
    colours = np.random.default_rng(number).integers(0, 255, (6, 9, 3), dtype=np.uint8)
    image = Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


PHOTOGRAPHS = [photograph(number) for number in range(12)]
CROPS = Shrinking(40, "bicubic", is_exact=False)


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch):
    # A segment of about three pictures: the size is a constant, its arithmetic is what is tested.
    monkeypatch.setattr(decoded_cache, "SEGMENT_BYTES", 3 * 40 * 66 * 3)


def opened(folder, shrink=CROPS, limit=PLENTY):
    cache = DecodedCache(folder, shrink, limit)
    cache.renew()
    return cache


def filled(folder, photographs, shrink=CROPS, limit=PLENTY):
    cache = opened(folder, shrink, limit)
    pixels = [cache.picture(content, "x").pixels() for content in photographs]
    cache.renew()
    return pixels


def segments(folder):
    return sorted(folder.glob("*/*.safetensors"))


def size(folder):
    return sum(path.stat().st_size for path in segments(folder))


def poison(folder):
    """Make every kept picture black: whoever then sees black has read the cache."""
    for path in segments(folder):
        save_file({k: torch.zeros_like(v) for k, v in load_file(path).items()}, path)


def test_a_picture_is_the_same_missed_pending_and_found(tmp_path):
    cache = opened(tmp_path)
    for content in PHOTOGRAPHS:
        missed = cache.picture(content, "x").pixels()
        assert torch.equal(cache.picture(content, "x").pixels(), missed)
        assert missed.shape == (3, 40, 66)
    cache.renew()
    again = opened(tmp_path)
    for content in PHOTOGRAPHS:
        found = again.picture(content, "x")
        assert torch.equal(found.pixels(), CROPS(content, "x").pixels())
        assert (found.height, found.width) == (90, 150)


def test_what_is_kept_is_read(tmp_path):
    filled(tmp_path, PHOTOGRAPHS)
    poison(tmp_path)
    cache = opened(tmp_path)
    assert not any(cache.picture(content, "x").pixels().any() for content in PHOTOGRAPHS)


@pytest.mark.parametrize("resize", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_evaluation_crops_are_those_without_a_cache(tmp_path, synthetic, form, resize):
    contents = [photograph(n, *shape, form) for n, shape in enumerate([(150, 90), (64, 99)])]
    spec = replace(SPEC, resize=resize)
    shrink = Shrinking.for_run(synthetic.config("data.augment=none").data, spec)
    plain, cache = EvalTransform(spec), opened(tmp_path, shrink)
    for _ in range(2):
        rows = TrainTransform(spec, "none", (0.9, 1.0), cache.picture)
        for content in contents:
            (row,) = rows(content, "x", [0])
            assert torch.equal(row, plain(decode(content, "x")))
        cache.renew()


def test_crops_are_close_to_those_of_the_whole_picture(tmp_path):
    content = photograph(0, 300, 200)
    plain = TrainTransform(SPEC, "crop", (0.8, 1.0), open_picture)(content, "x", SEEDS)
    side = Shrinking(36, "bicubic", is_exact=False)
    cached = TrainTransform(SPEC, "crop", (0.8, 1.0), opened(tmp_path, side).picture)
    for one, other in zip(plain, cached(content, "x", SEEDS), strict=True):
        assert (one.float() - other.float()).abs().mean() < 6


@pytest.mark.parametrize(
    ("words", "side", "is_exact"),
    [
        (["data.augment=none"], 32, True),
        (["data.augment=crop", "data.crop_scale=[1.0,1.0]"], 32, False),
        (["data.augment=crop", "data.crop_scale=[0.25,1.0]"], 64, False),
    ],
)
def test_pictures_are_no_larger_than_the_smallest_crop_needs(synthetic, words, side, is_exact):
    data = synthetic.config(*words).data
    assert Shrinking.for_run(data, SPEC) == Shrinking(side, "bicubic", is_exact)


def test_smaller_pictures_stay_as_they_are(tmp_path):
    content = photograph(1, 50, 30, "PNG")
    (pixels,) = filled(tmp_path, [content])
    assert torch.equal(pixels, decode(content, "x"))


def test_other_bytes_and_other_shrinking_are_other_pictures(tmp_path):
    filled(tmp_path, PHOTOGRAPHS[:6])
    poison(tmp_path)
    assert opened(tmp_path).picture(PHOTOGRAPHS[6], "x").pixels().any()
    for other in (
        Shrinking(41, "bicubic", is_exact=False),
        Shrinking(40, "bilinear", is_exact=False),
        Shrinking(40, "bicubic", is_exact=True),
    ):
        assert other.name != CROPS.name
        assert opened(tmp_path, other).picture(PHOTOGRAPHS[0], "x").pixels().any()


def test_a_damaged_image_is_named_and_not_kept(tmp_path):
    cache = opened(tmp_path)
    with pytest.raises(DamagedSampleError, match="sample-7"):
        cache.picture(PHOTOGRAPHS[0][:300], "sample-7")
    cache.renew()
    assert not segments(tmp_path)


def test_a_torn_segment_is_dropped(tmp_path):
    filled(tmp_path, PHOTOGRAPHS)
    torn = segments(tmp_path)[0]
    torn.write_bytes(torn.read_bytes()[:-50])
    cache = opened(tmp_path)
    assert not torn.exists()
    for content in PHOTOGRAPHS:
        assert torch.equal(cache.picture(content, "x").pixels(), CROPS(content, "x").pixels())


def test_what_a_killed_process_left_goes_when_it_is_old(tmp_path):
    folder = tmp_path / CROPS.name
    folder.mkdir()
    old, new = folder / ".1-1.part", folder / ".2-2.part"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 9999,) * 2)
    opened(tmp_path)
    assert not old.exists()
    assert new.exists()


def test_a_run_does_not_push_out_what_it_uses(tmp_path):
    """A set larger than the limit: the part that fits stays, over epochs."""
    filled(tmp_path, PHOTOGRAPHS[:3])
    one = size(tmp_path)
    limit = 2.5 * one
    filled(tmp_path, PHOTOGRAPHS, limit=limit)
    kept = segments(tmp_path)
    assert len(kept) == 2
    assert size(tmp_path) <= limit
    filled(tmp_path, PHOTOGRAPHS, limit=limit)
    assert segments(tmp_path) == kept


def test_what_was_used_longest_ago_gives_way(tmp_path):
    filled(tmp_path, PHOTOGRAPHS[:9])
    first, second, third = segments(tmp_path)
    for age, path in ((100, second), (200, first), (300, third)):
        os.utime(path, (time.time() - age,) * 2)
    other = Shrinking(40, "bilinear", is_exact=False)
    limit = size(tmp_path) + 100
    filled(tmp_path, PHOTOGRAPHS[:3], other, limit)
    assert not third.exists()
    assert first.exists()
    assert second.exists()
    assert size(tmp_path) <= limit


def fill_some(folder, first, limit):
    """What one process of many does."""
    decoded_cache.SEGMENT_BYTES = 3 * 40 * 66 * 3
    numbers = [(first + number) % 40 for number in range(30)]
    cache = opened(folder, CROPS, limit)
    largest = 0
    for number in numbers:
        cache.picture(photograph(number), "x")
        largest = max(largest, size(folder))
    return largest


@pytest.mark.parametrize("fits", [True, False])
def test_processes_share_a_folder_and_its_limit(tmp_path, fits):
    filled(tmp_path / "one", PHOTOGRAPHS[:3])
    limit = PLENTY if fits else 1.5 * size(tmp_path / "one")
    with ProcessPoolExecutor(4, get_context("fork")) as pool:
        largest = list(pool.map(fill_some, [tmp_path / "all"] * 4, range(0, 40, 10), [limit] * 4))
    assert max(largest) <= limit
    assert not list((tmp_path / "all").glob("*/.*.part"))
    count = len(segments(tmp_path / "all"))
    # Where all fits, those that began before others published hold some pictures twice.
    assert count in (range(14, 41) if fits else [1])
    cache = opened(tmp_path / "all")
    for content in map(photograph, range(40)):
        assert torch.equal(cache.picture(content, "x").pixels(), CROPS(content, "x").pixels())


def test_a_segment_waits_while_another_process_makes_room(tmp_path):
    folder = tmp_path / "all"
    folder.mkdir()
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        with (folder / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            filling = pool.submit(fill_some, folder, 0, PLENTY)
            while not list(folder.glob("*/.*.part")):
                assert not filling.done()
                time.sleep(0.01)
            with pytest.raises(TimeoutError):
                filling.result(timeout=1)
            assert not segments(folder)
            # The process was forked with the file open, so closing it here would not unlock it.
            fcntl.flock(file, fcntl.LOCK_UN)
        filling.result(timeout=60)
    assert len(segments(folder)) == 10


def test_training_rows_do_not_depend_on_what_is_kept(synthetic, tmp_path):
    def rows(workers, folder):
        config = synthetic.config(
            "train.global_batch_size=16",
            f"data.workers={workers}",
            "data.crop_scale=[0.5,1.0]",
            f"data.decoded_cache={folder}",
        )
        shards = open_shards("data.train", config.data.train)
        schedule = plan_schedule(config, shards, 4)
        stream = TrainStream(config, shards, schedule, SPEC, World()).batches(Position())
        return torch.stack([batch.image for batch, _ in islice(stream, 9)])

    cold = rows(0, tmp_path / "a")
    assert len(segments(tmp_path / "a")) > 10
    assert torch.equal(rows(0, tmp_path / "a"), cold)
    assert torch.equal(rows(2, tmp_path / "b"), cold)
    assert torch.equal(rows(2, tmp_path / "b"), cold)
    poison(tmp_path / "b")
    assert not torch.equal(rows(2, tmp_path / "b"), cold)
