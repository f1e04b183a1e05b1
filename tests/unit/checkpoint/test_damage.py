"""Whatever happens to a byte of a checkpoint, it is seen, and the one before it serves."""

import json
import os
import random
from collections import Counter

import pytest
import torch

from mmscale.checkpoint.files import Checkpoint, newest_sound, step_folder
from mmscale.checkpoint.resume import open_trained
from mmscale.checkpoint.state import DIGEST, STATE, Best, RunState
from mmscale.checkpoint.write import Kept, publish_if_whole, take_snapshot, write_share
from mmscale.config.load import validate
from mmscale.contracts import NamedTensor, Position, World
from mmscale.errors import CheckpointError
from tests.sealed import read_state_of, seal

CONFIG = validate({"data": {"train": "shards"}}).model_dump(mode="json")
ATTACHED = {"text/tokenizer.json": b'{"model": {}}', "text/config.json": b"{}"}


@pytest.fixture
def run_dir(tmp_path):
    """Two checkpoints of two ranks each, with moments, further files and everything in them."""
    for step in (10, 20):
        aside = step_folder(tmp_path, step).with_suffix(".partial")
        aside.mkdir(parents=True)
        for rank in (0, 1):
            tensors = [
                NamedTensor(name, torch.full((3, 4), float(step)), {"exp_avg": torch.ones(3, 4)})
                for name in ("vision.weight", "text.weight", "momentum.text.weight")
            ]
            run = RunState(
                step,
                step - 1,
                position=Position(1, 3 * step),
                lanes=4,
                best=Best("eval/i2t_r1", 50.0, 10),
                scaler={"scale": 1024.0},
            )
            parts = {"evaluation": {"metrics": {"eval/i2t_r1": 50.0, "eval/odd": float("nan")}}}
            noise = {"cpu": torch.get_rng_state()}
            kept = Kept(CONFIG, {"data.train": "0" * 64}, ATTACHED)
            write_share(take_snapshot(run, parts, kept, tensors, noise, World(rank, 2)), aside)
        assert publish_if_whole(aside)
    return tmp_path


def _files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _damage(path, draw):
    """Flip one bit, cut the file or remove it."""
    kind = draw.choices(("flip", "cut", "remove"), (8, 3, 1))[0]
    content = path.read_bytes()
    if kind == "remove":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(content[: draw.randrange(len(content))])
    else:
        place, bit = draw.randrange(len(content)), draw.randrange(8)
        damaged = bytearray(content)
        damaged[place] ^= 1 << bit
        path.write_bytes(damaged)
    return kind, content


def test_five_hundred_damages_are_seen_and_the_checkpoint_before_serves(run_dir):
    """In every file, those of the further files and of the digest among them."""
    draw, done = random.Random(7), Counter()
    files = _files(step_folder(run_dir, 20))
    assert [path.name for path in files[:2]] == [
        "rank-00000-of-00002.safetensors",
        "rank-00001-of-00002.safetensors",
    ]
    assert len(files) == 6
    for number in range(500):
        path = files[number % len(files)]
        kind, content = _damage(path, draw)
        told = []
        found = newest_sound(run_dir, World(), told.append)
        assert found.state.step == 10, (path.name, kind)
        assert "falling back" in told[0]
        path.write_bytes(content)
        done[kind, path.name] += 1
    assert len(done) == 3 * len(files), "each kind, in each file"
    assert newest_sound(run_dir, World()).state.step == 20


def test_a_best_checkpoint_that_is_damaged_is_not_replaced_by_another(run_dir):
    assert open_trained(run_dir).state.step == 10
    _damage(step_folder(run_dir, 10) / STATE, random.Random(1))
    with pytest.raises(CheckpointError, match="step-00000010"):
        open_trained(run_dir)


def test_what_nobody_wrote_is_never_read(run_dir):
    folder = step_folder(run_dir, 20)
    (folder / "notes.txt").write_text("mine")
    (folder / "text" / "vocab.txt").write_text("other words")
    assert Checkpoint(folder).files == sorted(ATTACHED)


def _places(value, path=()):
    """Every place within a JSON value, the outer ones first."""
    if path:
        yield path
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from _places(inner, (*path, key))


def _at(state, path):
    for key in path:
        state = state[key]
    return state


# Whose keys are names that a run is free to choose.
FREE = {"config", "contents", "parts", "scaler", "tensors"}


def _changes(holder, key):
    """What one who edits a JSON value may do at one place of it."""
    value = holder[key]
    if isinstance(holder, dict):
        yield {name: inner for name, inner in holder.items() if name != key}
        yield {f"{name}r" if name == key else name: inner for name, inner in holder.items()}
    for other in ("text", 0.5, [[{}]], {}, None):
        if type(other) is not type(value):
            yield {**holder, key: other} if isinstance(holder, dict) else [other]


def test_a_key_that_is_missing_unknown_or_of_another_kind_is_a_fault_not_a_default(run_dir):
    """Although the digest is right: it may be that of one who edited the file."""
    folder = step_folder(run_dir, 20)
    whole = read_state_of(folder)
    places = [
        path
        for path in _places(whole)
        if not FREE & set(path[:-1]) and path[-1] not in {"best", *ATTACHED}
    ]
    assert ("state", "position", "rows") in places
    tried = 0
    for path in places:
        for changed in _changes(_at(whole, path[:-1]), path[-1]):
            state = json.loads(json.dumps(whole))
            if path[:-1]:
                _at(state, path[:-2])[path[-2]] = changed
            else:
                state = changed
            seal(folder, state)
            with pytest.raises(CheckpointError):
                Checkpoint(folder)
            tried += 1
    assert tried > 100
    seal(folder, whole)
    assert Checkpoint(folder).state.step == 20


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("state", "step"), -1),
        (("state", "position", "rows"), 2**80),
        (("state", "stage"), 1),
        (("state", "over"), "never"),
        (("state", "step"), 20.5),
        (("parts", "evaluation"), 0),
        (("world",), 3),
        (("world",), 10**9),
        (("tensors", "vision.weight", "rank"), 2),
        (("files", "../../outside"), {"sha256": "0" * 64, "bytes": 0}),
        (("files", "/outside"), {"sha256": "0" * 64, "bytes": 0}),
        (("config", "optim", "lr"), "fast"),
        (("config", "unheard_of"), 1),
    ],
)
def test_a_value_that_cannot_be_is_refused_although_its_digest_is_right(run_dir, place, value):
    folder = step_folder(run_dir, 20)
    state = read_state_of(folder)
    _at(state, place[:-1])[place[-1]] = value
    seal(folder, state)
    with pytest.raises(CheckpointError):
        Checkpoint(folder)
    assert newest_sound(run_dir, World()).state.step == 10


@pytest.mark.parametrize("content", [b"", b"null", b"[" * 100_000, b'{"a": ' * 100_000, b"\xff"])
def test_a_state_that_is_no_state_is_a_fault(run_dir, content):
    folder = step_folder(run_dir, 20)
    seal(folder, content)
    with pytest.raises(CheckpointError):
        Checkpoint(folder)
    (folder / DIGEST).unlink()
    with pytest.raises(CheckpointError):
        Checkpoint(folder)


def test_tensors_that_are_not_those_of_the_state_are_a_fault_when_they_are_read(run_dir):
    folder = step_folder(run_dir, 20)
    whole = read_state_of(folder)
    for change in ({"shape": [4, 3]}, {"moments": ["exp_avg", "exp_avg_sq"]}):
        state = {**whole, "tensors": json.loads(json.dumps(whole["tensors"]))}
        state["tensors"]["text.weight"].update(change)
        seal(folder, state)
        with pytest.raises(CheckpointError, match="state"):
            Checkpoint(folder).moments("text.weight")


def test_an_older_version_is_named(run_dir):
    folder = step_folder(run_dir, 20)
    (folder / DIGEST).unlink()
    state = read_state_of(folder)
    (folder / STATE).write_text(json.dumps({**state, "version": 1, **state.pop("state")}))
    with pytest.raises(CheckpointError, match="format version 1, this mmscale reads 2"):
        Checkpoint(folder)


def test_something_else_in_the_place_of_a_file_is_not_waited_for(run_dir):
    for name in (STATE, DIGEST, "text/config.json"):
        path = step_folder(run_dir, 20) / name
        content = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        assert newest_sound(run_dir, World()).state.step == 10
        path.unlink()
        path.write_bytes(content)
