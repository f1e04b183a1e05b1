"""The journal of a sweep, without trainings: outcomes are handed in."""

import json
import os
import sys

import pytest

from mmscale.errors import ConfigError
from mmscale.sweep.page import draw_sweep, rows, sweep_table, write_sweep_page
from mmscale.sweep.space import Space
from mmscale.sweep.study import Study, trial_folder
from mmscale.sweep.trial import Outcome, claim, values
from mmscale.sweep.workers import best, sweep_json

pytest.importorskip("optuna")


@pytest.fixture
def space():
    parameters = {
        "optim.lr": {"kind": "log_uniform", "low": 1e-4, "high": 1e-2},
        "data.workers": {"kind": "int", "low": 0, "high": 8, "step": 2},
        "loss.preset": {"kind": "choice", "values": ["clip", "siglip"]},
        "optim.weight_decay": {"kind": "uniform", "low": 0.0, "high": 0.5},
    }
    pruning = {"after_trials": 1, "after_evaluations": 1}
    return Space(base=["demo"], parameters=parameters, trials=14, pruning=pruning)


def _value(values) -> float:
    return -abs(values["optim.lr"] - 3e-3)


def _run(study: Study, most: int) -> list[dict]:
    """Take up to `most` trials to their ends; the values that they had."""
    tried = []
    while len(tried) < most and (attempt := study.next()) is not None:
        attempt.end(Outcome([_value(attempt.values)] * 2))
        attempt.close()
        tried.append(attempt.values)
    return tried


def test_a_search_that_was_left_goes_on_as_it_would_have_gone(space, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    straight = _run(Study(space, tmp_path / "a"), 99)
    tried = _run(Study(space, tmp_path / "b"), 3)
    left = Study(space, tmp_path / "b").next()
    assert left is not None
    left.goes_on([_value(left.values)])
    left.close()  # as the end of its process does
    tried += _run(Study(space, tmp_path / "b"), 99)
    assert len(straight) == space.trials
    assert tried == straight
    assert len({trial["optim.lr"] for trial in straight}) == space.trials


def test_a_trial_in_another_worker_s_hands_is_left_alone(space, tmp_path):
    theirs, ours = Study(space, tmp_path).next(), Study(space, tmp_path).next()
    assert theirs is not None
    assert ours is not None
    assert (theirs.number, ours.number) == (0, 1)
    assert claim(theirs.folder) is None
    theirs.close()
    handle = claim(trial_folder(tmp_path, 0))
    assert handle is not None
    os.close(handle)


def test_trials_of_workers_that_died_are_taken_up_first_with_their_numbers_and_values(
    space, tmp_path
):
    dead = [Study(space, tmp_path).next() for _ in range(3)]
    dead[1].end(Outcome([1.0]))
    for attempt in dead:
        attempt.close()
    alive = [Study(space, tmp_path).next() for _ in range(3)]
    assert [attempt.number for attempt in alive] == [0, 2, 3]
    assert [alive[0].values, alive[1].values] == [dead[0].values, dead[2].values]
    states = [(trial.number, trial.state) for trial in Study(space, tmp_path).trials()]
    assert states == [(0, "running"), (1, "complete"), (2, "running"), (3, "running")]


def test_a_trial_whose_worker_died_before_it_began_is_taken_up(space, tmp_path, monkeypatch):
    """Between the journal's queue and the trial; the search goes on as if that had not been."""
    (tmp_path / "a").mkdir()
    straight = _run(Study(space, tmp_path / "a"), 4)
    out = tmp_path / "b"
    out.mkdir()
    _run(Study(space, out), 1)
    Study(space, out).next().close()
    study = Study(space, out)
    with monkeypatch.context() as killed:
        killed.setattr(study._study, "ask", lambda: sys.exit("killed"))
        with pytest.raises(SystemExit):
            study.next()
    assert [trial.state for trial in study.trials()] == ["complete", "running"]
    assert _run(Study(space, out), 3) == straight[1:4]
    assert [trial.number for trial in study.trials()] == [0, 1, 2, 3]


def test_no_more_trials_are_made_than_were_asked_for(space, tmp_path):
    few = space.model_copy(update={"trials": 2})
    assert len(_run(Study(few, tmp_path), 99)) == 2
    assert Study(few, tmp_path).next() is None
    assert len(_run(Study(space, tmp_path), 99)) == space.trials - 2


def test_a_trial_below_the_median_stops_and_a_failed_one_says_why(space, tmp_path):
    study = Study(space, tmp_path)
    for curve in ([10.0, 20.0], [11.0, 21.0]):
        attempt = study.next()
        assert all(attempt.goes_on(curve[:count]) for count in (1, 2))
        attempt.end(Outcome(curve))
    attempt = study.next()
    assert attempt.goes_on([1.0]), "one evaluation is granted"
    assert not attempt.goes_on([1.0, 2.0])
    attempt.end(Outcome([1.0, 2.0], finished=False))
    study.next().end(Outcome([], finished=False, why="optim.lr=7 is too much"))
    trials = study.trials()
    assert [trial.state for trial in trials] == ["complete", "complete", "pruned", "failed"]
    assert [trial.value for trial in trials] == [20.0, 21.0, 2.0, None]
    assert trials[3].why == "optim.lr=7 is too much"
    assert best(space, trials) == trials[1]
    assert best(space.model_copy(update={"direction": "minimize"}), trials) == trials[0]
    found = sweep_json(space, trials)
    assert found["best"] == 1
    assert found["words"][0] == "demo"
    assert [row[0] for row in rows(space, trials)[1:]] == ["2", "1", "3", "4"]
    assert "best: trial 2, eval/mean 21" in sweep_table(space, trials)
    page = write_sweep_page(tmp_path, space, trials).read_text("utf-8")
    assert "Trial 4 failed: optim.lr=7 is too much" in page
    assert "mmscale train demo" in page


def test_the_end_of_a_trial_does_not_depend_on_when_it_was_looked_at(space, tmp_path):
    """Evaluations that come in one go, after the training has ended, are judged as one by one."""
    study = Study(space, tmp_path)
    for curve in ([10.0, 20.0, 30.0], [1.0, 2.0, 40.0], [11.0, 21.0, 3.0]):
        study.next().end(Outcome(curve))
    assert [trial.state for trial in study.trials()] == ["complete", "pruned", "complete"]
    assert [trial.curve for trial in study.trials()][1] == (1.0, 2.0)
    assert [trial.value for trial in study.trials()] == [30.0, 2.0, 3.0]


def test_a_search_without_a_value_still_has_a_picture(space, tmp_path):
    study = Study(space, tmp_path)
    assert study.next() is not None
    assert draw_sweep(space, study.trials()).startswith("data:image/png;base64,")


def test_a_trial_is_judged_by_any_figure_of_any_set(tmp_path):
    lines = [{"step": step, "eval/coco/t2i_r1": 2.0 * step} for step in (5, 10)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert values(tmp_path, "eval/coco/t2i_r1") == [10.0, 20.0]
    with pytest.raises(ConfigError, match=r"metric=eval/mean is no figure .* eval/coco/t2i_r1"):
        values(tmp_path, "eval/mean")
