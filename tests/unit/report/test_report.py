import pytest

from mmscale.config.schema import Config
from mmscale.contracts import World
from mmscale.report.metrics import read_metrics
from mmscale.report.report import Report
from mmscale.report.space import read_space
from tests.unit.diagnostics.faulty_embeddings import healthy

PAIRS = healthy(0.7)(32, 16, 0)


def config(tmp_path, **log):
    return Config.model_validate(
        {"data": {"train": "x"}, "run": {"dir": str(tmp_path / "run")}, "log": log}
    )


def speak(report, first, last):
    with report:
        report.say("hello")
        for step in range(first, last + 1):
            report.training({"step": step, "loss": 1.0})
        report.probe({"step": last, "health/gap": 0.5})
        report.evaluation({"step": last, "eval/i2t_r1": 1.0, "eval/t2i_r1": 2.0}, PAIRS)
        report.warn("careful")
        report.finish({"step": last})


def test_the_main_rank_writes_every_line_and_ends_with_finished(tmp_path, capsys):
    speak(Report(config(tmp_path), World(), 3, 0), 1, 3)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line.get("step") for line in lines] == [1, 2, 3, 3, 3, 3]
    assert lines[-1] == {"finished": True, "step": 3}
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "hello" in shown.err
    assert "warning: careful" in shown.err


def test_another_rank_is_silent_and_leaves_no_file(tmp_path, capsys):
    speak(Report(config(tmp_path), World(rank=1, size=2, local_rank=1), 3, 0), 1, 3)
    shown = capsys.readouterr()
    assert shown.out + shown.err == ""
    assert list(tmp_path.iterdir()) == []


def test_going_on_cuts_the_log_back_to_the_checkpoint(tmp_path):
    speak(Report(config(tmp_path), World(), 4, 0), 1, 4)
    speak(Report(config(tmp_path), World(), 6, 2), 3, 6)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert sum("finished" in line for line in lines) == 1
    # The evaluation after step 4 came after the checkpoint.
    assert [moment["step"] for moment in read_space(tmp_path / "run" / "space.jsonl")] == [6]


def test_starting_over_forgets_the_log(tmp_path):
    speak(Report(config(tmp_path), World(), 2, 0), 1, 2)
    speak(Report(config(tmp_path), World(), 1, 0), 1, 1)
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 4


def test_close_may_be_called_twice(tmp_path):
    report = Report(config(tmp_path), World(), 1, 0)
    report.close()
    report.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_missing_wandb_ends_every_rank_alike(tmp_path, monkeypatch, rank):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    from mmscale.errors import ConfigError

    with pytest.raises(ConfigError, match=r"pip install 'mmscale\[wandb\]'") as caught:
        Report(config(tmp_path, wandb="offline"), World(rank=rank, size=2), 1, 0)
    assert caught.value.exit_code == 2
