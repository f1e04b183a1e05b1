import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmscale.config.schema import Config
from mmscale.errors import ConfigError
from mmscale.report.page import Page, space_pictures
from mmscale.report.wandb import WandbSink


class FakeRun:
    def __init__(self, fail=False):
        self.fail, self.lines, self.finished = fail, [], False

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, line):
        if self.fail:
            raise ConnectionError("gone")
        self.lines.append(line)

    def finish(self):
        self.finished = True


@pytest.fixture
def config(tmp_path):
    return Config.model_validate(
        {"data": {"train": "x"}, "run": {"dir": str(tmp_path)}, "log": {"wandb": "offline"}}
    )


def install(monkeypatch, init):
    module = SimpleNamespace(
        init=init,
        Settings=lambda **_: None,
        Image=lambda picture, caption=None: (picture.size, caption),
        __spec__=SimpleNamespace(name="wandb"),
    )
    monkeypatch.setitem(sys.modules, "wandb", module)


def test_lines_go_to_one_run_whose_id_outlives_a_restart(config, monkeypatch):
    starts = []

    def init(**words):
        starts.append(words)
        return FakeRun()

    install(monkeypatch, init)
    for _ in range(2):
        sink = WandbSink(config, pytest.fail)
        sink.write({"step": 1, "loss": 0.5})
        sink.close()
        run = sink._run
        assert run.lines == [{"step": 1, "loss": 0.5}]
        assert run.finished
    assert starts[0]["id"] == starts[1]["id"]
    assert starts[0]["mode"] == "offline"
    assert starts[0]["project"] == "mmscale"


def test_a_failure_is_told_once_and_then_ignored(config, monkeypatch):
    warnings = []
    install(monkeypatch, lambda **_: FakeRun(fail=True))
    sink = WandbSink(config, warnings.append)
    for step in range(3):
        sink.write({"step": step})
    sink.close()
    assert len(warnings) == 1
    assert "gone" in warnings[0]


def test_a_start_that_fails_is_told_once(config, monkeypatch):
    def init(**_):
        raise TimeoutError("no answer")

    warnings = []
    install(monkeypatch, init)
    sink = WandbSink(config, warnings.append)
    sink.write({"step": 1})
    sink.close()
    assert len(warnings) == 1


def test_a_broken_installation_is_a_wrong_configuration(config, monkeypatch):
    def fail(name):
        raise ImportError("half installed")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("importlib.import_module", fail)
    with pytest.raises(ConfigError, match="half installed"):
        WandbSink(config, pytest.fail)


@pytest.mark.parametrize("asked", [False, True])
def test_photographs_go_only_where_asked(config, monkeypatch, make_examples, histograms, asked):
    run = FakeRun()
    install(monkeypatch, lambda **_: run)
    log = config.log.model_copy(update={"wandb_images": asked})
    sink = WandbSink(config.model_copy(update={"log": log}), pytest.fail)
    pictures = space_pictures([{"step": 1, "similarity": histograms}])
    sink.show(Page(Path("report.html"), pictures, make_examples()))
    sink.close()
    (line,) = run.lines
    assert line.pop("report/Similarity of pairs")[0][0] > 500
    shown = {"report/best retrievals", "report/worst retrievals", "report/doubtful captions"}
    assert set(line) == (shown if asked else set())
    if asked:
        assert line["report/best retrievals"] == [((8, 6), "i2t, rank 1: a dog")]
