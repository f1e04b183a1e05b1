"""`mmscale lab parity`: every engine, sharding and cut of the batch gives one process's losses."""

import pytest

from mmscale.lab.cells import Result
from mmscale.lab.grid import run_grid
from mmscale.lab.lab_parity import (
    ALONE,
    DEFAULTS,
    ENGINES,
    TOLERANCE,
    VARIANTS,
    cells,
    measure,
    page,
)
from tests.whole.small_run import SETTINGS

STEPS = 20


# Every engine, and every variant on some of them; `mmscale lab parity` runs them all.
LAUNCHED = {
    ALONE: ("plain", "chunked", "queue"),
    "accelerate, 2 ranks": ("chunked",),
    "ZeRO-1, 2 ranks": ("queue",),
    "ZeRO-2, 2 ranks": ("plain",),
    "ZeRO-3, 2 ranks": ("queue",),
    "ZeRO-3 + offload, 2 ranks": ("chunked",),
}


@pytest.mark.soak
def test_every_engine_gives_the_losses_of_one_process(synthetic, tmp_path):
    settings = tmp_path / "small.yaml"
    settings.write_text(SETTINGS, "utf-8")
    grid = [
        cell
        for cell in cells((str(settings), f"data.train={synthetic.train}"), [0])
        if cell.labels["variant"] in LAUNCHED[cell.labels["engine"]]
    ]
    assert {cell.labels["engine"] for cell in grid} == set(ENGINES)
    found = run_grid(grid, tmp_path / "out", measure)
    results = {(r.labels["engine"], r.labels["variant"]): r for r in found}
    assert [r.error for r in found] == [None] * len(found)
    plain, queue = (results[ALONE, variant].figures["losses"] for variant in ("plain", "queue"))
    assert plain[-1] < plain[0]
    assert max(abs(p - q) for p, q in zip(plain, queue, strict=True)) > 0.1, "the queue counts"
    for (engine, variant), result in results.items():
        losses = result.figures["losses"]
        assert len(losses) == STEPS
        wanted = queue if variant == "queue" else plain
        apart = max(abs(ours - theirs) for ours, theirs in zip(losses, wanted, strict=True))
        assert apart <= TOLERANCE, f"{engine}, {variant}: {apart:.1e}"
        assert result.figures["keys"] == results[ALONE, "plain"].figures["keys"]
    assert "ZeRO-3 + offload" in page(found)


def result(engine, variant, losses, keys=("a", "b"), error=None):
    figures = {} if error else {"losses": losses, "keys": list(keys)}
    return Result({"engine": engine, "variant": variant}, (), 1.0, figures, error)


def test_the_table_names_what_is_apart():
    other = "ZeRO-2, 2 ranks"
    shown = page(
        [
            result(ALONE, "plain", [3.0, 2.0]),
            result(ALONE, "chunked", [3.0, 2.000001]),
            result(ALONE, "queue", [4.0, 3.5]),
            result(other, "plain", [3.0, 2.00002]),
            result(other, "chunked", [3.0, 2.5]),
            result(other, "queue", [], error="a rank died"),
        ]
    )
    assert "| reference, 3.000 to 2.000 | 1.0e-06 | reference, 4.000 to 3.500 |" in shown
    assert "| 2.0e-05 | **5.0e-01** | failed |" in shown
    moved = [result(ALONE, "plain", [3.0]), result(other, "plain", [3.0], keys=("z",))]
    assert "**inf**" in page(moved)


def test_the_grid_is_whole_and_its_users_words_win():
    found = cells(("demo", "train.duration=3 steps"), range(2))
    assert len(found) == len(ENGINES) * len(VARIANTS)
    for cell in found:
        assert cell.words[: len(DEFAULTS) + 1] == ("demo", *DEFAULTS)
        assert cell.words[len(DEFAULTS) + 1] == "train.duration=3 steps"
        assert "run.seed=0" in cell.words
