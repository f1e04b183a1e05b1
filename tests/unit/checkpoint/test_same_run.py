"""What a run may change when it goes on, and what makes it another one."""

import shutil
from pathlib import Path

import pytest

from mmscale.checkpoint.files import Checkpoint, step_folder
from mmscale.checkpoint.resume import contents_of, require_same_run, starting_point
from mmscale.checkpoint.saver import Saver
from mmscale.checkpoint.state import RunState
from mmscale.checkpoint.write import Kept, take_snapshot
from mmscale.config.load import as_yaml, load_config
from mmscale.config.schema import CheckpointConfig
from mmscale.contracts import World
from mmscale.data.pack import PackSettings, pack
from mmscale.data.shards import open_train
from mmscale.data.synth import SynthSettings, render
from mmscale.errors import ConfigError

ALONE = World()
LANES = [64]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A folder of shards. Read only."""
    folder = tmp_path_factory.mktemp("pairs")
    render(folder / "source", SynthSettings(24, seed=0, size=32, val=4, test=4))
    pack(folder / "source", folder / "packed", PackSettings(samples_per_shard=8))
    return folder / "packed" / "train"


@pytest.fixture
def place(packed, tmp_path, monkeypatch):
    """A folder with a copy of the data, a weights file and a tower's folder; we are in it."""
    shutil.copytree(packed, tmp_path / "data")
    (tmp_path / "first.safetensors").write_bytes(b"weights")
    (tmp_path / "bert").mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / "bert" / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


WORDS = (
    "demo",
    "data.train=data",
    "data.eval=data",
    "model.vision.weights=first.safetensors",
    "model.text.name=hf:bert",
)


def _trained(folder, *words):
    """A run's configuration, and a checkpoint of it."""
    config = load_config([*WORDS, f"run.dir={folder}", *words])
    contents = contents_of(config, open_train(config.data), ALONE, None)
    kept = Kept(config.model_dump(mode="json"), contents)
    saver = Saver(Path(folder), ALONE, CheckpointConfig(), print)
    saver.save(take_snapshot(RunState(3, 3, lanes=64), {}, kept, [], {}, ALONE))
    saver.finish()
    return config, Checkpoint(step_folder(Path(folder), 3))


def _go_on(checkpoint, *words, lanes=LANES):
    config = load_config([*WORDS, *words])
    before = checkpoint.config, checkpoint.contents
    contents = contents_of(config, open_train(config.data), ALONE, before)
    require_same_run(checkpoint, config, contents, lanes)
    return contents


def test_what_lies_elsewhere_or_is_spelt_otherwise_is_the_same(place):
    _, checkpoint = _trained("run")
    (place / "link").symlink_to(place / "data")
    spellings = [f"data.train={place / 'data'}", "data.train=link", "data.train=./data/../data"]
    for word in [*spellings, "data.train=data/*.tar", f"data.train=[{place}/data]"]:
        assert _go_on(checkpoint, word) == checkpoint.contents
    for name in ("data", "bert", "first.safetensors"):
        shutil.move(place / name, place / f"moved-{name}")
    (place / "moved-bert" / ".cache").mkdir()
    (place / "moved-bert" / ".cache" / "seen").write_text("hidden files do not count")
    moved = ["data.train=moved-data", "data.eval=null", "model.text.name=hf:moved-bert"]
    moved += [f"model.vision.weights={place}/moved-first.safetensors"]
    assert _go_on(checkpoint, *moved) == checkpoint.contents


def test_a_file_that_was_needed_once_may_be_gone(place):
    _, checkpoint = _trained("run")
    (place / "first.safetensors").unlink()
    shutil.rmtree(place / "bert")
    assert _go_on(checkpoint) == checkpoint.contents, "also in the checkpoints to come"


@pytest.mark.parametrize(
    ("word", "before"),
    [
        ("model.vision.weights=other.safetensors", "first.safetensors"),
        ("model.text.name=hf:other", "hf:bert"),
        ("run.seed=5", "0"),
        ("data.shuffle_buffer=64", "8192"),
        ("data.captions=first", "random"),
        ("optim.lr=0.25", "0.0"),
        ("train.global_batch_size=32", "128"),
        ("data.image_size=64", "96"),
    ],
)
def test_what_makes_it_another_run_is_refused_with_both_values(place, word, before):
    _, checkpoint = _trained("run")
    (place / "other.safetensors").write_bytes(b"other weights")
    shutil.copytree("bert", "other")
    (place / "other" / "tokenizer.json").write_text("other")
    with pytest.raises(ConfigError) as refused:
        _go_on(checkpoint, word)
    key, _, value = word.partition("=")
    assert str(refused.value).count("differs from") == 1
    assert key in str(refused.value)
    assert value in str(refused.value)
    assert before in str(refused.value)


@pytest.mark.parametrize(
    "word",
    [
        "run.dir=other",
        "train.duration=9 epochs",
        "train.micro_batch_size=8",
        "data.workers=0",
        "data.eval=null",
        "data.decoded_cache=cache",
        "engine.timeout=77",
        "engine.precision=bf16",
        "log.every=3 steps",
        "checkpoint.keep=7",
        "eval.every=null",
        "probe.every=9 steps",
        "guard.action=off",
        "stop.patience=3",
        "stop.above_chance=null",
        "stop.rise=2",
    ],
)
def test_what_may_change_may(place, word):
    _, checkpoint = _trained("run")
    assert _go_on(checkpoint, word) == checkpoint.contents


def test_the_size_of_a_cache_may_change_with_the_cache(place):
    _, checkpoint = _trained("run")
    assert _go_on(checkpoint, "data.decoded_cache=cache", "data.cache_gb=3") == checkpoint.contents


def test_data_packed_anew_at_the_same_place_are_other_data(place):
    _, checkpoint = _trained("run")
    render(place / "source", SynthSettings(24, seed=1, size=32, val=4, test=4))
    shutil.rmtree("data")
    pack(place / "source", place / "packed", PackSettings(samples_per_shard=8))
    shutil.move(place / "packed" / "train", "data")
    with pytest.raises(ConfigError) as refused:
        _go_on(checkpoint)
    now = contents_of(load_config(list(WORDS)), open_train(checkpoint.config.data), ALONE, None)
    for digest in (checkpoint.contents["data.train"], now["data.train"]):
        assert digest[:12] in str(refused.value)
    assert "data.train=data holds other shards" in str(refused.value)


def test_weights_of_sources_belong_to_the_data(place):
    shutil.copytree("data", "more")
    heavy = "data.train=[{shards: data, weight: 2}, {shards: more}]"
    moved = heavy.replace("more", "moved")
    _, checkpoint = _trained("run", heavy)
    shutil.move("more", "moved")
    assert _go_on(checkpoint, moved) == checkpoint.contents
    with pytest.raises(ConfigError, match="differs from"):
        _go_on(checkpoint, moved.replace("weight: 2", "weight: 3"))


def test_without_a_manifest_names_and_sizes_tell(place):
    _, checkpoint = _trained("run", "data.resampled=true")
    shutil.move("data", "moved")
    assert _go_on(checkpoint, "data.resampled=true", "data.train=moved") == checkpoint.contents
    with next(Path("moved").glob("*.tar")).open("ab") as shard:
        shard.write(bytes(512))
    with pytest.raises(ConfigError, match="differs from"):
        _go_on(checkpoint, "data.resampled=true", "data.train=moved")


def test_a_world_that_the_lanes_do_not_suit_is_refused(place):
    _, checkpoint = _trained("run")
    with pytest.raises(ConfigError, match=r"data.lanes=48 differs from the 64"):
        _go_on(checkpoint, lanes=[48])


def test_a_running_mean_that_nobody_kept_is_not_made_up(place):
    _, checkpoint = _trained("run")
    with pytest.raises(ConfigError, match=r"eval.weights=ema needs the running mean"):
        _go_on(checkpoint, "eval.weights=ema")


def test_other_settings_from_a_named_checkpoint_are_shown_the_way(place):
    _, checkpoint = _trained("run")
    words = ("run.dir=another", "run.resume=run", "optim.lr=1e-7")
    with pytest.raises(ConfigError, match=r"model.weights=run and leave run.resume out"):
        _go_on(checkpoint, *words)


def _started(folder, *words):
    """The folder as a run leaves it that was ended before its first checkpoint."""
    config = load_config([*WORDS, f"run.dir={folder}", *words])
    folder.mkdir()
    (folder / "config.yaml").write_text(as_yaml(config.model_dump(mode="json")))
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 4.0}\n')
    return config


def test_a_run_without_a_checkpoint_starts_over_and_another_is_refused(place):
    config = _started(place / "run", "optim.lr=1e-3")
    assert starting_point(config, ALONE, print) is None
    other = config.model_copy(update={"optim": config.optim.model_copy(update={"lr": 2e-3})})
    with pytest.raises(ConfigError, match=r"optim.lr=0.001 there, 0.002 here"):
        starting_point(other, ALONE, print)
    # Nor is it cut back to another run's checkpoint.
    _trained("elsewhere")
    resume = other.run.model_copy(update={"resume": "elsewhere"})
    with pytest.raises(ConfigError, match="holds another run"):
        starting_point(other.model_copy(update={"run": resume}), ALONE, print)
    (place / "run" / "metrics.jsonl").write_text("")
    assert starting_point(other, ALONE, print) is None, "nothing is lost"


def test_a_log_without_a_configuration_that_can_be_read_is_of_another_run(place):
    config = _started(place / "run")
    for content in (None, "data: {train: elsewhere", "data: 3", "unheard: of"):
        (place / "run" / "config.yaml").unlink(missing_ok=True)
        if content:
            (place / "run" / "config.yaml").write_text(content)
        with pytest.raises(ConfigError, match="holds another run"):
            starting_point(config, ALONE, print)
    never = replace_run(config, resume="never", overwrite=True)
    assert starting_point(never, ALONE, print) is None
    assert not (place / "run" / "metrics.jsonl").exists()


def replace_run(config, **changes):
    return config.model_copy(update={"run": config.run.model_copy(update=changes)})
