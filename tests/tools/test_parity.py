"""the study `parity`: every engine, sharding and cut of the batch gives one process's losses."""

import json
import sys

import pytest

from tests.whole.small_run import SETTINGS, succeed
from tools.studies.cells import Result
from tools.studies.parity import ALONE, DEFAULTS, ENGINES, TOLERANCE, VARIANTS, cells, page

STEPS = 20


@pytest.mark.soak
def test_every_launch_gives_the_losses_of_one_process(synthetic, tmp_path):
    settings, figures = tmp_path / "small.yaml", tmp_path / "parity.json"
    settings.write_text(SETTINGS, "utf-8")
    words = [settings, f"data.train={synthetic.train}", "--out", tmp_path, "--json", figures]
    done = succeed([sys.executable, "-m", "tools.studies", "parity", *words], timeout=1500)
    results = {
        (r["labels"]["engine"], r["labels"]["variant"]): r
        for r in json.loads(figures.read_text("utf-8"))
    }
    assert set(results) == {(engine, variant) for engine in ENGINES for variant in VARIANTS}
    plain, queue = (results[ALONE, variant]["figures"]["losses"] for variant in ("plain", "queue"))
    assert plain[-1] < plain[0]
    assert max(abs(p - q) for p, q in zip(plain, queue, strict=True)) > 0.1, "the queue counts"
    for (engine, variant), result in results.items():
        assert result["error"] is None, result["error"]
        losses = result["figures"]["losses"]
        assert len(losses) == STEPS
        wanted = queue if variant == "queue" else plain
        apart = max(abs(ours - theirs) for ours, theirs in zip(losses, wanted, strict=True))
        assert apart <= TOLERANCE, f"{engine}, {variant}: {apart:.1e}"
        assert result["figures"]["keys"] == results[ALONE, "plain"]["figures"]["keys"]
    assert "ZeRO-3 + offload" in done.stdout


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
