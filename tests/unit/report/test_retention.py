"""The page's picture of gain and loss, and what a folder may claim about it."""

import json

import pytest

from mmscale.errors import DataError
from mmscale.report.metrics import read_metrics
from mmscale.report.page import training_pictures, write_page
from mmscale.report.retention import LINE_NAME, draw_retention, read_line

TITLE = "Gain and loss since the start"
COURSE = [(0, 0.0, 0.0), (10, 4.0, 1.5), (20, 6.0, 9.0)]
LINE = {
    "budget": 2.0,
    "metric": "eval/mean",
    "chosen": 0.5,
    "points": [
        {"share": 0.0, "gain": 0.0, "lost": 0.0, "figures": {}},
        {"share": 0.5, "gain": 5.0, "lost": 1.0, "figures": {}},
        {"share": 1.0, "gain": 6.0, "lost": 9.0, "figures": {}},
    ],
}


@pytest.fixture
def folder(tmp_path):
    lines = [{"step": s, "retain/gain": gain, "retain/lost": lost} for s, gain, lost in COURSE]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (tmp_path / LINE_NAME).write_text(json.dumps(LINE))
    return tmp_path


def test_a_run_with_a_budget_has_a_picture_and_the_line_is_in_it(folder):
    assert TITLE in write_page(folder).path.read_text("utf-8")
    lines, line = read_metrics(folder / "metrics.jsonl"), read_line(folder / LINE_NAME)
    assert line.chosen == 0.5
    assert draw_retention(lines, line) != draw_retention(lines, None)
    (folder / LINE_NAME).unlink()
    assert read_line(folder / LINE_NAME) is None
    assert TITLE in write_page(folder).path.read_text("utf-8")


def test_each_of_several_retained_sets_has_a_curve_of_its_own(folder):
    figures = [(30.0, 50.0), (29.0, 49.5), (21.0, 60.0)]
    points = [
        point | {"figures": {"eval/old/mean": old, "eval/pets/top1": pets, "eval/images": 9}}
        for point, (old, pets) in zip(LINE["points"], figures, strict=True)
    ]
    several = LINE | {"sets": ["old", "pets", "gone"], "points": points}
    (folder / LINE_NAME).write_text(json.dumps(several))
    line = read_line(folder / LINE_NAME)
    assert line.lost_by_set() == {"old": [0.0, 1.0, 9.0], "pets": [0.0, 0.5, -10.0]}
    lines = read_metrics(folder / "metrics.jsonl")
    (folder / LINE_NAME).write_text(json.dumps(several | {"sets": ["old"]}))
    assert draw_retention(lines, line) != draw_retention(lines, read_line(folder / LINE_NAME))
    (folder / LINE_NAME).write_text(json.dumps(LINE))
    assert read_line(folder / LINE_NAME).lost_by_set() == {}


def test_a_run_that_retains_nothing_has_none():
    assert draw_retention([{"step": 1, "loss": 2.0}], None) is None
    assert TITLE not in [plot.title for plot in training_pictures([{"step": 1, "loss": 2.0}])]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        json.dumps(LINE | {"points": []}),
        json.dumps(LINE | {"budget": "2"}),
        json.dumps(LINE | {"points": [{"share": 2.0, "gain": 0.0, "lost": 0.0}]}),
        json.dumps(LINE | {"points": [{"share": 0.1, "gain": float("nan"), "lost": 0.0}]}),
    ],
)
def test_what_is_no_line_is_named(folder, content):
    (folder / LINE_NAME).write_text(content)
    with pytest.raises(DataError, match=LINE_NAME):
        write_page(folder)
