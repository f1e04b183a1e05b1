"""Sinks beside the log: their own readers find every figure, and none holds a run up."""

import json
import sqlite3
import subprocess
import time

import httpx
import pytest

from mmscale.config.schema import Config
from mmscale.contracts import World
from mmscale.errors import ConfigError
from mmscale.report import sink as sinks
from mmscale.report.metrics import read_metrics
from mmscale.report.mlflow import MlflowSink
from mmscale.report.report import SINKS, Report
from mmscale.report.sink import Sink, figures_of
from mmscale.report.tensorboard import TensorboardSink
from mmscale.report.trackio import TrackioSink
from tests.whole.outage import silent_server

LINES = [
    {"step": step, "loss": 1 / 3**step, "eval/i2t_r1@64": 10.0 * step, "keys_digest": "ab"}
    for step in range(1, 8)
]


def config(folder, **log):
    return Config.model_validate(
        {"data": {"train": "x"}, "run": {"dir": str(folder / "run")}, "log": log}
    )


def record(settings, first, last):
    """A run from one step to another, as training reports it."""
    with Report(settings, World(), 7, first - 1) as report:
        for line in LINES[first - 1 : last]:
            report.training(line)
        report.finish({"step": last})


def expected(name):
    return [(line["step"], line[name]) for line in LINES]


def test_tensorboards_own_reader_finds_every_figure_once_also_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = config(tmp_path, tensorboard=True)
    record(settings, 1, 5)
    # Goes on from a checkpoint of step 3.
    record(settings, 4, 7)
    reader = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    reader.Reload()
    assert set(reader.Tags()["scalars"]) == {"loss", "eval/i2t_r1@64"}
    for name in ("loss", "eval/i2t_r1@64"):
        found = [(event.step, event.value) for event in reader.Scalars(name)]
        assert [step for step, _ in found] == list(range(1, 8))
        assert [value for _, value in found] == pytest.approx([v for _, v in expected(name)])


def test_mlflows_store_holds_every_figure_and_setting_of_one_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow-skinny is not installed")
    monkeypatch.chdir(tmp_path)
    settings = config(tmp_path, mlflow="offline", wandb_project="mine")
    record(settings, 1, 3)
    record(settings, 4, 7)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'run' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("mine")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["optim.lr"] == "0.0005"
    for name in ("loss", "eval/i2t_r1@64"):
        found = client.get_metric_history(run.info.run_id, name.replace("@", "_"))
        assert sorted((metric.step, metric.value) for metric in found) == expected(name)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_trackios_store_holds_every_figure_of_one_run(tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio", reason="trackio is not installed")
    for module in ("trackio.utils", "trackio.sqlite_storage"):
        monkeypatch.setattr(f"{module}.TRACKIO_DIR", tmp_path / "kept")
    settings = config(tmp_path, trackio="offline", wandb_project="mine")
    record(settings, 1, 3)
    record(settings, 4, 7)
    assert trackio.__version__
    (path,) = (tmp_path / "kept").glob("*.db")
    with sqlite3.connect(path) as store:
        rows = store.execute("SELECT run_id, step, metrics FROM metrics ORDER BY step").fetchall()
    assert len({run for run, _, _ in rows}) == 1
    kept = [(step, json.loads(metrics)) for _, step, metrics in rows]
    for name in ("loss", "eval/i2t_r1@64"):
        assert [(step, figures[name]) for step, figures in kept if name in figures] == expected(
            name
        )


@pytest.fixture
def read_only(tmp_path):
    """A folder that cannot be written to, whoever asks."""
    folder = tmp_path / "run"
    folder.mkdir()
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "ro,size=1M", "tmpfs", str(folder)],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as error:
        pytest.skip(f"no mount: {error}")
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize(
    ("kind", "log"),
    [(TensorboardSink, {"tensorboard": True}), (MlflowSink, {"mlflow": "offline"}),
     (TrackioSink, {"trackio": "offline"})],
    ids=lambda value: getattr(value, "library", ""),
)  # fmt: skip
def test_a_folder_that_cannot_be_written_is_told_once(tmp_path, read_only, kind, log):
    pytest.importorskip(kind.library, reason=f"{kind.extra} is not installed")
    warnings = []
    sink = kind(config(tmp_path, **log), warnings.append)
    for line in LINES:
        sink.write(line)
    sink.close()
    (warning,) = warnings
    assert warning.startswith(f"{kind.library} failed (")
    assert "\n" not in warning


class Posting(Sink):
    """Sends every line to a web server, and waits for its answer without end."""

    setting, library, extra = "wandb", "httpx", "wandb"
    address = ""

    def _begin(self, config):
        self.sent = []

    def _send(self, lines):
        self.sent += lines
        httpx.post(self.address, json=lines, timeout=None)

    def _end(self):
        pass


@pytest.fixture
def hanging(tmp_path, monkeypatch):
    """A sink whose server takes connections and never answers, and what it warns of."""
    monkeypatch.setattr(sinks, "CLOSING_SECONDS", 0.5)
    warnings = []
    with silent_server() as address:
        monkeypatch.setattr(Posting, "address", address)
        sink = Posting(config(tmp_path, wandb="online"), warnings.append)
        yield sink, warnings


def test_a_server_that_hangs_takes_no_time_of_a_run(hanging):
    sink, warnings = hanging
    sink.write(LINES[0])
    began = time.perf_counter()
    for _ in range(1000):
        sink.write(LINES[1])
    assert time.perf_counter() - began < 0.5
    began = time.perf_counter()
    sink.close()
    assert time.perf_counter() - began < 2
    assert warnings == ["httpx took longer than 0.5 s to end and was left alone"]


def test_lines_that_a_hanging_server_does_not_take_do_not_pile_up(hanging, monkeypatch):
    sink, warnings = hanging
    monkeypatch.setattr(sinks, "MOST_WAITING", 10)
    for _ in range(200):
        sink.write(LINES[0])
    assert sink._waiting.qsize() <= 10
    assert len(warnings) == 1
    assert "10 lines wait" in warnings[0]


def test_a_server_that_is_gone_is_told_once_and_nothing_waits_for_it(tmp_path, monkeypatch):
    with silent_server() as address:
        pass
    monkeypatch.setattr(Posting, "address", address)
    warnings = []
    sink = Posting(config(tmp_path, wandb="online"), warnings.append)
    sink.write(LINES[0])
    sink._thread.join(10)
    for line in LINES:
        sink.write(line)
    assert sink._waiting.qsize() == 0
    sink.close()
    assert len(warnings) == 1
    assert "training goes on without it" in warnings[0]


def test_a_hanging_tracking_server_takes_no_time_of_a_run(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow-skinny is not installed")
    monkeypatch.setattr(sinks, "CLOSING_SECONDS", 0.5)
    with silent_server() as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        began = time.perf_counter()
        record(config(tmp_path, mlflow="online"), 1, 7)
        assert time.perf_counter() - began < 20
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 8


@pytest.mark.parametrize("kind", SINKS, ids=lambda kind: kind.library)
def test_a_library_that_is_missing_ends_every_rank_alike(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    log = {kind.setting: True if kind.setting == "tensorboard" else "offline"}
    for rank in (0, 1):
        with pytest.raises(ConfigError, match=rf"pip install 'mmscale\[{kind.extra}\]'") as caught:
            Report(config(tmp_path, **log), World(rank=rank, size=2), 1, 0)
        assert f"log.{kind.setting}=" in str(caught.value)


@pytest.mark.parametrize(
    ("log", "environment", "told"),
    [
        ({"mlflow": "online"}, {}, "MLFLOW_TRACKING_URI"),
        ({"trackio": "online"}, {}, "TRACKIO_SPACE_ID or TRACKIO_SERVER_URL"),
        ({"trackio": "offline"}, {"TRACKIO_SPACE_ID": "me/mine"}, "where TRACKIO_SPACE_ID says"),
    ],
    ids=["mlflow", "trackio", "trackio-elsewhere"],
)
def test_where_figures_go_must_be_said_and_be_meant(tmp_path, monkeypatch, log, environment, told):
    for name in ("MLFLOW_TRACKING_URI", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(ConfigError, match=told):
        Report(config(tmp_path, **log), World(rank=1, size=2), 1, 0)


def test_figures_are_numbers():
    line = {"step": 3, "loss": 0.5, "images": 24, "finished": True, "verdict": "healthy", "x": None}
    assert figures_of(line) == {"loss": 0.5, "images": 24.0}
