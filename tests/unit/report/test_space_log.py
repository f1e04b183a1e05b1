import json
from itertools import pairwise

import pytest

from mmscale.errors import DataError
from mmscale.report.space import MOST_MOMENTS, SpaceLog, read_space


def steps(path):
    return [moment["step"] for moment in read_space(path)]


def write(log, *steps):
    for step in steps:
        log.write(step, {"similarity": {"width": step}})


def test_going_on_forgets_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "space.jsonl"
    write(SpaceLog(path, 0), 10, 20, 30)
    log = SpaceLog(path, 20)
    write(log, 25)
    assert steps(path) == [10, 20, 25]
    # A finished run evaluates once more: one moment a step.
    write(SpaceLog(path, 25), 25)
    assert steps(path) == [10, 20, 25]
    assert [child.name for child in tmp_path.iterdir()] == ["space.jsonl"]


@pytest.mark.parametrize("left", [b'{"step": 5}\n', b"torn"])
def test_starting_over_forgets_everything(tmp_path, left):
    path = tmp_path / "space.jsonl"
    path.write_bytes(left)
    SpaceLog(path, 0)
    assert not path.exists()


def test_the_space_log_of_a_long_run_keeps_evenly_spaced_snapshots(tmp_path):
    path = tmp_path / "space.jsonl"
    write(SpaceLog(path, 0), *range(10, 5010, 10))
    kept = steps(path)
    assert len(kept) == MOST_MOMENTS
    assert (kept[0], kept[-1]) == (10, 5000)
    gaps = [after - before for before, after in pairwise(kept)]
    even = (5000 - 10) / (MOST_MOMENTS - 1)
    assert max(gaps) <= 2.5 * even


@pytest.mark.parametrize("line", ["{", "[1]", '{"step": true}', '{"similarity": {}}', "[" * 10**5])
def test_a_damaged_line_of_the_space_log_is_refused(tmp_path, line):
    path = tmp_path / "space.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n" + line + "\n")
    with pytest.raises(DataError, match=r"space\.jsonl"):
        SpaceLog(path, 5)
