"""The feature cache: made once, never stale, bounded."""

import os
import time
from dataclasses import replace

import pytest
import torch

from mmscale.data.caption_text import with_cleaning
from mmscale.data.features import FeatureTable
from mmscale.data.shards import open_shards
from mmscale.evaluation import encoded
from mmscale.evaluation.encoded import FeatureCache
from mmscale.model.build import build_model
from mmscale.parallel.peers import Alone
from tests.ranks.tiny import tiny_config


@pytest.fixture(scope="module")
def towers():
    return build_model(tiny_config().model, None, 0)


@pytest.fixture(scope="module")
def sets(synthetic):
    return [open_shards("data.eval", str(folder)) for folder in (synthetic.val, synthetic.test)]


def made(number=0):
    """A table that tells which call made it."""
    return FeatureTable(
        image=torch.full((3, 2), float(number)),
        text=torch.zeros(3, 2),
        first=torch.arange(4),
        image_ids=torch.arange(3),
        good=torch.ones(3, dtype=torch.bool),
        cut=torch.zeros(3, dtype=torch.bool),
        keys=["a", "b", "c"],
        captions=["x", "y", "z"],
        damaged=[],
    )


class Cache:
    """A run's cache, and how many tables it had to make."""

    def __init__(self, folder, towers, limit=1e9):
        self.cache, self.made = FeatureCache(folder, *towers, limit), 0

    def get(self, shards):
        def make(kept):
            assert kept.count == 0
            self.made += 1
            return made()

        return self.cache.table(shards, Alone(), make)


def files(folder):
    return {path.name: path for path in folder.glob("*.safetensors")}


def test_a_table_is_made_once(tmp_path, towers, sets):
    for _ in range(2):
        Cache(tmp_path, towers).get(sets[0])
    second = Cache(tmp_path, towers)
    assert second.get(sets[0]).keys == ["a", "b", "c"]
    assert second.made == 0
    assert list(tmp_path.iterdir()) == list(files(tmp_path).values())


def test_whatever_the_features_depend_on_makes_another_table(tmp_path, towers, sets):
    model, spec = towers
    Cache(tmp_path, towers).get(sets[0])
    trained, _ = build_model(tiny_config().model, None, 1)
    others = [
        (model, replace(spec, image_size=24)),
        (model, replace(spec, mean=(0.1, 0.2, 0.3))),
        (model, replace(spec, interpolation="bilinear")),
        (model, replace(spec, context_length=8)),
        *((model, with_cleaning(spec, name)) for name in ("whitespace", "lower", "canonicalize")),
        (trained, spec),
    ]
    for other in others:
        cache = Cache(tmp_path, other)
        cache.get(sets[0])
        # CLIP's tokenizer cleans and lowers by itself: its tokens are the same.
        cleaned = getattr(other[1].tokenize, "cleaning", None)
        assert cache.made == (cleaned not in ("whitespace", "lower")), other[1]
    cache = Cache(tmp_path, towers)
    cache.get(sets[1])
    assert cache.made == 1


def test_other_heads_share_the_towers_table(tmp_path, towers, sets):
    Cache(tmp_path, towers).get(sets[0])
    wider = build_model(tiny_config(model__embed_dim=24).model, None, 0)
    cache = Cache(tmp_path, wider)
    cache.get(sets[0])
    assert cache.made == 0


def test_the_table_used_longest_ago_goes_first_and_never_one_in_use(tmp_path, towers, sets):
    model, spec = towers
    for size in (16, 24, 32):
        Cache(tmp_path, (model, replace(spec, image_size=size))).get(sets[0])
    oldest, middle, newest = sorted(files(tmp_path))
    for age, name in ((300, oldest), (200, middle), (100, newest)):
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    one = (tmp_path / oldest).stat().st_size
    cache = Cache(tmp_path, (model, replace(spec, image_size=40)), limit=3.5 * one)
    cache.get(sets[0])
    assert oldest not in files(tmp_path)
    assert {middle, newest} < set(files(tmp_path))
    tight = Cache(tmp_path, (model, replace(spec, image_size=48)), limit=0.5 * one)
    for shards in sets:
        tight.get(shards)
    assert len(files(tmp_path)) == 2
    for shards in sets:
        tight.get(shards)
    assert tight.made == 2


def test_the_pace_of_a_pass_leaves_out_what_was_there_before(monkeypatch):
    clock = iter((0.0, 1.0, 9.0, 21.0, 22.0))
    monkeypatch.setattr(encoded.time, "monotonic", lambda: next(clock))
    told = []
    progress = encoded.pace_of_features(told.append)
    for done in (1000, 1160, 1400, 1420):
        progress(done, 1420)
    assert told == [
        "features: 1,400 of this rank's 1,420 images, 20.0/s, 0:00:01 left",
        "features: 1,420 of this rank's 1,420 images, 20.0/s, 0:00:00 left",
    ]
