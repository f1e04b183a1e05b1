import json
import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmscale.errors import DataError
from mmscale.report.metrics import MetricsLog, read_metrics


def write(path, *lines):
    log = MetricsLog(path)
    for line in lines:
        log.write(line)
    log.close()


def test_a_line_is_on_disk_before_the_log_is_closed(tmp_path):
    log = MetricsLog(tmp_path / "deep" / "metrics.jsonl")
    log.write({"step": 1, "loss": 0.5})
    assert read_metrics(tmp_path / "deep" / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]
    log.close()


@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_floats_keep_every_bit(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    write(path, {"step": 1, "loss": value})
    assert struct.pack("d", read_metrics(path)[0]["loss"]) == struct.pack("d", value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, torch.tensor(math.nan)])
def test_what_is_no_finite_number_becomes_null(tmp_path, value):
    write(tmp_path / "m.jsonl", {"step": 1, "nested": {"values": [value, 1.0]}})
    text = (tmp_path / "m.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 1,
        "nested": {"values": [None, 1.0]},
    }


def test_tensor_scalars_are_written_as_numbers(tmp_path):
    write(tmp_path / "m.jsonl", {"step": torch.tensor(3), "loss": torch.tensor(0.5)})
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 3, "loss": 0.5}]


def test_resume_cuts_later_lines_the_finished_line_and_a_torn_one(tmp_path):
    path = tmp_path / "m.jsonl"
    write(
        path,
        {"step": 1, "loss": 0.1 + 0.2},
        {"step": 2, "loss": 1.0},
        {"step": 2, "eval/i2t_r1": 10.0},
        {"step": 3, "loss": 1.0},
        {"step": 3, "health/gap": 1.0},
        {"finished": True, "step": 2},
    )
    kept = path.read_bytes().splitlines(keepends=True)[:3]
    with path.open("ab") as file:
        file.write(b'{"step": 1, "lo')

    log = MetricsLog.resume(path, 2)
    assert path.read_bytes() == b"".join(kept)
    log.write({"step": 3, "loss": 2.0})
    log.close()
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 2, 3]
    assert [child.name for child in tmp_path.iterdir()] == ["m.jsonl"]


def test_a_last_line_without_its_newline_is_torn_even_if_it_parses(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    assert read_metrics(path) == [{"step": 1}]
    MetricsLog.resume(path, 5).close()
    assert path.read_bytes() == b'{"step": 1}\n'


def test_resume_without_a_log_starts_one(tmp_path):
    MetricsLog.resume(tmp_path / "m.jsonl", 7).close()
    assert read_metrics(tmp_path / "m.jsonl") == []


def test_garbage_before_the_last_line_is_told_with_its_place(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(DataError, match="line 2"):
        read_metrics(path)


def test_a_missing_file_is_our_error(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_metrics(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    "line",
    [
        '{"step": "7", "loss": 1.0}',
        '{"step": [], "loss": 1.0}',
        '{"step": 7, "loss": {"a": 1}}',
        '{"step": 7, "eval/i2t_r1": "high"}',
        '{"step": 7, "health/auc": [1]}',
        '{"step": 1' + "0" * 400 + "}",
        '{"step": 7, "loss": ' + "[" * 100_000 + "]" * 100_000 + "}",
    ],
)
def test_figures_that_are_no_numbers_are_told_with_their_place(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(DataError, match="line 2"):
        read_metrics(path)
    with pytest.raises(DataError, match="line 2"):
        MetricsLog.resume(path, 1)
