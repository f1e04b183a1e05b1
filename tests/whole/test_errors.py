"""A mistake ends with its exit code and one sentence that names it, on every rank, in seconds."""

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mmscale.contracts import World
from mmscale.data.manifest import Shard, read_manifest, write_manifest
from mmscale.errors import LaunchError
from mmscale.parallel.world import check_world
from tests.ranks.launch import free_port
from tests.whole.command import ROOT, TRAIN, explain, run
from tests.whole.small_run import (
    ALONE,
    deepspeed,
    succeed,
    torchrun,
    training_lines,
    words_for,
    write_settings,
)

EPOCH = 6


@pytest.fixture(scope="module")
def settings(synthetic, tmp_path_factory) -> list[str]:
    """The configuration's words."""
    return words_for(synthetic, write_settings(tmp_path_factory.mktemp("settings")))


def _sentences(stderr: str) -> list[str]:
    """What mmscale said, a line a process."""
    return [line for line in stderr.splitlines() if line.startswith("mmscale: ")]


def _refused(words, code: int, *parts: str, timeout: float = 60, **options) -> str:
    """Run a command that must end with `code` and one sentence holding `parts`."""
    done = run(words, timeout=timeout, **options)
    assert done.returncode == code, explain(done)
    assert "Traceback" not in done.stderr, explain(done)
    sentences = _sentences(done.stderr)
    assert len(sentences) == 1, explain(done)
    for part in parts:
        assert part in done.stderr, explain(done)
    return done.stderr


WRONG_WORDS = [
    (["train.epochs=3"], ["train.epochs", "train.duration='3 epochs'"]),
    (["data.batchsize=64"], ["data.batchsize", "train.global_batch_size"]),
    (["optim.lr=abc"], ["optim.lr='abc'", "a number"]),
    (["nowhere/missing.yaml"], ["nowhere/missing.yaml"]),
    (["--epochs"], ["--epochs", "key=value"]),
    (["train.duration=3"], ["train.duration"]),
]


@pytest.mark.parametrize(("words", "parts"), WRONG_WORDS, ids=[w[0][0] for w in WRONG_WORDS])
def test_wrong_words_are_refused_before_torch_is_loaded(settings, tmp_path, words, parts):
    begun = time.monotonic()
    _refused([*ALONE, *settings, f"run.dir={tmp_path / 'run'}", *words], 2, *parts)
    assert time.monotonic() - begun < 5
    assert not (tmp_path / "run").exists()


def test_every_wrong_word_is_told_at_once(settings):
    done = run([*ALONE, *settings, "train.epochs=3", "optim.lr=abc", "data.workers=-1"])
    assert done.returncode == 2
    for name in ("train.epochs", "optim.lr", "data.workers"):
        assert name in done.stderr


def test_without_a_configuration_the_presets_are_listed():
    _refused([*ALONE], 2, "demo", "flickr8k")


def test_a_micro_batch_that_does_not_divide_names_the_nearest_that_do(settings, tmp_path):
    words = [f"run.dir={tmp_path / 'run'}", "train.micro_batch_size=7"]
    _refused([*ALONE, *settings, *words], 2, "train.micro_batch_size=7", "14 or 21")


def test_a_deepspeed_launch_passes_2_on_and_every_rank_says_why(settings):
    done = run([*deepspeed(), *settings, "train.epochs=3"], timeout=60)
    assert done.returncode == 2, explain(done)
    assert len([s for s in _sentences(done.stderr) if "train.epochs" in s]) == 2, explain(done)


def test_every_rank_of_a_torchrun_launch_says_why_and_ends_with_2(settings):
    """A fault that is found after torch is loaded; torchrun itself ends with 1."""
    done = run([*torchrun(), *settings, "train.micro_batch_size=7"], timeout=60)
    assert done.returncode == 1, explain(done)
    said = [s for s in _sentences(done.stderr) if "train.micro_batch_size=7" in s]
    assert len(said) == 2, explain(done)
    codes = re.findall(r"exitcode\s*:\s*(-?\d+)", done.stderr)
    assert "2" in codes, explain(done)


def test_shards_that_do_not_match_are_named(settings, tmp_path):
    words = [f"run.dir={tmp_path / 'run'}", f"data.train={tmp_path}/none-*.tar"]
    _refused([*ALONE, *settings, *words], 4, "data.train", "none-*.tar", "no shard matches")


def test_shards_without_a_manifest_name_the_verb_that_writes_it(settings, pairs_copy, tmp_path):
    (pairs_copy / "manifest.json").unlink()
    words = [f"run.dir={tmp_path / 'run'}", f"data.train={pairs_copy}"]
    _refused([*ALONE, *settings, *words], 4, "mmscale index", str(pairs_copy))


def test_a_shard_of_another_size_than_its_manifest_is_named(settings, pairs_copy, tmp_path):
    shard = pairs_copy / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    words = [f"run.dir={tmp_path / 'run'}", f"data.train={pairs_copy}"]
    _refused([*ALONE, *settings, *words], 4, str(shard), "its manifest says")


def test_a_deleted_shard_is_named(settings, pairs_copy, tmp_path):
    shard = pairs_copy / "train-000002.tar"
    shard.unlink()
    words = [f"run.dir={tmp_path / 'run'}", f"data.train={pairs_copy}"]
    _refused([*ALONE, *settings, *words], 4, str(shard))


@pytest.fixture
def pairs_copy(synthetic, tmp_path) -> Path:
    """The training shards in a folder that a test may damage."""
    return Path(shutil.copytree(synthetic.train, tmp_path / "shards"))


def _rewrite(folder: Path, number: int, edit: Callable[[int, str, bytes], bytes]) -> list[str]:
    """Give members of a shard other content, by sample and suffix; returns the samples' keys.

    The manifest then describes the new file, as that of shards packed from damaged sources does.
    """
    manifest = read_manifest(folder)
    shard = manifest.shards[number]
    path, keys, offsets = folder / shard.name, [], []
    with tarfile.open(path) as old:
        members = [(info, old.extractfile(info).read()) for info in old if info.isfile()]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as new:
        for info, content in members:
            key, suffix = info.name.split(".", 1)
            if not keys or keys[-1] != key:
                keys.append(key)
                offsets.append(new.offset)
            content = edit(len(keys) - 1, suffix, content)
            info.size = len(content)
            new.addfile(info, io.BytesIO(content))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    described: Shard = replace(
        shard, bytes=path.stat().st_size, sha256=digest, offsets=tuple(offsets)
    )
    shards = [*manifest.shards]
    shards[number] = described
    write_manifest(folder, replace(manifest, shards=tuple(shards)))
    return keys


def _truncate(samples: set[int]) -> Callable[[int, str, bytes], bytes]:
    """Cut the images of some samples in half."""
    return lambda sample, suffix, content: (
        content[: len(content) // 2] if sample in samples and suffix == "jpg" else content
    )


def _one_image_one_caption(sample: int, suffix: str, content: bytes) -> bytes:
    """A truncated image in sample 3, an empty caption in sample 20."""
    if sample == 20 and suffix == "json":
        fields = json.loads(content)
        return json.dumps(fields | {"captions": ["", *fields["captions"][1:]]}).encode()
    return _truncate({3})(sample, suffix, content)


def test_damaged_samples_are_named_counted_and_tolerated_up_to_the_limit(
    settings, pairs_copy, tmp_path
):
    keys = _rewrite(pairs_copy, 1, _one_image_one_caption)
    words = [*settings, f"run.dir={tmp_path / 'run'}", f"data.train={pairs_copy}"]
    tolerant = ["data.max_damaged=0.5", f"train.duration={EPOCH} steps"]
    done = succeed([*ALONE, *words, *tolerant])
    for key in (keys[3], keys[20]):
        assert len([line for line in done.stderr.splitlines() if key in line]) == 1, explain(done)
    assert "empty caption" in done.stderr
    lines = training_lines(tmp_path / "run")
    assert len(lines) == EPOCH
    # All samples of an epoch were read: its last line counts both, and no line less than before.
    counts = [line["damaged"] for line in lines]
    assert counts == sorted(counts)
    assert counts[-1] == 2


def test_one_damaged_sample_is_too_many_where_none_is_allowed(settings, pairs_copy, tmp_path):
    keys = _rewrite(pairs_copy, 1, _truncate({3}))
    words = [f"run.dir={tmp_path / 'run'}", f"data.train={pairs_copy}", "data.max_damaged=0"]
    _refused([*ALONE, *settings, *words], 4, keys[3], "data.max_damaged=0", "mmscale verify")


def test_damaged_samples_are_named_whichever_rank_reads_them(settings, pairs_copy, tmp_path):
    damaged = {4, 20}
    keys = [
        keys[sample]
        for number in range(3)
        for keys in [_rewrite(pairs_copy, number, _truncate(damaged))]
        for sample in damaged
    ]
    words = [f"run.dir={tmp_path / 'run'}", f"data.train={pairs_copy}", "data.max_damaged=1"]
    done = succeed([*torchrun(), *settings, *words, f"train.duration={EPOCH} steps"])
    assert [key for key in keys if key not in done.stderr] == [], explain(done)


def test_a_rank_whose_data_cannot_be_read_ends_the_others_too(settings, pairs_copy, tmp_path):
    """A whole lane is unreadable: one rank owns it, both name it."""
    _rewrite(pairs_copy, 1, _truncate(set(range(8, 25))))
    words = [f"run.dir={tmp_path / 'run'}", f"data.train={pairs_copy}", "data.max_damaged=1"]
    begun = time.monotonic()
    done = run([*torchrun(), *settings, *words], timeout=90)
    assert done.returncode == 1, explain(done)
    said = [s for s in _sentences(done.stderr) if "no sample of a whole lane" in s]
    assert len(said) == 2, explain(done)
    assert len([s for s in said if "failed: " in s]) <= 1, explain(done)
    assert "Traceback" not in done.stderr.split("torch/distributed")[0], explain(done)
    assert time.monotonic() - begun < 60


def test_a_model_that_neither_hub_nor_cache_holds_is_named_within_a_minute(settings, tmp_path):
    """The hub's address swallows every packet: nothing answers, not even a refusal."""
    dead = {"HF_ENDPOINT": "http://192.0.2.1", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    words = ["model.text.name=hf:nobody/nothing", "model.text.options={}"]
    run_dir = f"run.dir={tmp_path / 'run'}"
    _refused([*ALONE, *settings, run_dir, *words], 2, "model.text.name=hf:nobody/nothing", env=dead)


def test_a_pretrained_model_that_cannot_be_had_is_not_replaced_by_a_random_one(settings, tmp_path):
    dead = {"HF_ENDPOINT": "http://192.0.2.1", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    words = [
        f"run.dir={tmp_path / 'run'}",
        "model.vision.name=timm:resnet18",
        "model.vision.weights=pretrained",
    ]
    settings = [word.replace("small.yaml", "plain.yaml") for word in settings]
    plain = Path(settings[0])
    plain.write_text(
        plain.with_name("small.yaml")
        .read_text("utf-8")
        .replace("options: {depths: [1, 1, 1, 1], dims: [16, 32, 48, 64]}", "options: {}"),
        "utf-8",
    )
    _refused([*ALONE, *settings, *words], 2, "timm:resnet18", env=dead)


def test_ranks_that_accelerate_does_not_join_are_refused_with_both_numbers(settings, tmp_path):
    """`accelerate launch --cpu --num_processes 2` starts processes that see a world of one."""
    launch = ("accelerate", "launch", "--cpu", "--num_processes", "2", "--num_machines", "1")
    ports = ("--mixed_precision", "no", "--dynamo_backend", "no")
    port = ("--main_process_port", str(free_port()))
    words = [*launch, *ports, *port, TRAIN, *settings, f"run.dir={tmp_path / 'run'}"]
    done = run(words, timeout=90, env={"HF_HOME": str(tmp_path)})
    assert done.returncode != 0, explain(done)
    sentences = _sentences(done.stderr)
    assert sentences, explain(done)
    assert all({"1", "2"} <= set(re.findall(r"\d+", s)) for s in sentences), explain(done)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_rendezvous_without_a_world_is_refused(settings, tmp_path):
    promise = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}
    words = [*ALONE, *settings, f"run.dir={tmp_path / 'run'}"]
    _refused(words, 6, "MASTER_ADDR=127.0.0.1", "WORLD_SIZE", "torchrun", env=promise)


def test_a_rank_outside_its_world_is_refused(settings, tmp_path):
    promise = {"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}
    words = [*ALONE, *settings, f"run.dir={tmp_path / 'run'}"]
    _refused(words, 6, "RANK=2", "WORLD_SIZE=2", env=promise)


def test_a_rank_that_never_comes_is_waited_for_only_so_long(settings, tmp_path):
    promise = {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    words = [*ALONE, *settings, f"run.dir={tmp_path / 'run'}", "engine.timeout=3"]
    _refused(words, 6, "could not join 2 ranks", env=promise)


@pytest.mark.parametrize(("promised", "seen"), [(2, 1), (1, 2), (4, 2)])
def test_an_engine_that_sees_another_world_is_refused_with_both_numbers(promised, seen):
    with pytest.raises(LaunchError, match=rf"promised {promised} ranks, deepspeed sees {seen}"):
        check_world(World(0, promised), seen, "deepspeed")
    check_world(World(0, promised), promised, "deepspeed")


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").glob("*.sbatch")), ids=lambda p: p.stem)
def test_a_job_script_that_is_run_by_hand_says_how_to_submit_it(script, tmp_path):
    done = run(["bash", script, "demo"], cwd=tmp_path)
    assert done.returncode == 2, explain(done)
    assert done.stderr == f"{script} is a job's script: submit it with sbatch {script} ...\n"


@pytest.fixture
def without_deepspeed(tmp_path) -> dict[str, str]:
    """Environment in which importing deepspeed fails, as where it is not installed."""
    package = tmp_path / "stub" / "deepspeed"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('raise ImportError("no deepspeed on this machine")\n')
    path = os.pathsep.join(filter(None, [str(package.parent), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path}


def test_without_deepspeed_one_device_trains(settings, without_deepspeed, tmp_path):
    words = [*ALONE, *settings, f"run.dir={tmp_path / 'run'}", "train.duration=2 steps"]
    done = succeed([*words, "optim.lr=3e-4"], env=without_deepspeed)
    lines = training_lines(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2], explain(done)
    assert lines[-1]["lr"] == 3e-4


def test_without_deepspeed_its_engine_is_refused(settings, without_deepspeed, tmp_path):
    words = [*ALONE, *settings, f"run.dir={tmp_path / 'run'}", "engine.kind=deepspeed"]
    _refused(
        words, 6, "deepspeed cannot be imported", "engine.kind=accelerate", env=without_deepspeed
    )
