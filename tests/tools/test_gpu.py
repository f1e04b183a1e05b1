"""`make gpu` runs as a program where no card is there: its figures, and the page made of them."""

import json
import sys

import pytest

from tests.whole.command import explain, run


@pytest.mark.slow
def test_the_step_is_measured_on_every_side_and_the_page_has_it(tmp_path):
    page = tmp_path / "gpu.md"
    words = ["-m", "tools.gpu", "step", "--device", "cpu", "--out", tmp_path, "--page", page]
    done = run([sys.executable, *words], timeout=600)
    assert done.returncode == 0, explain(done)
    found = json.loads((tmp_path / "step.json").read_text("utf-8"))
    sides = {result["side"]: result for result in found["results"]}
    assert set(sides) == {"ours", "ours_compiled", "open_clip", "open_clip_compiled"}
    for side, result in sides.items():
        assert result["samples_per_second"] > 0
        assert "aten::" in (tmp_path / f"kernels-{side}.txt").read_text("utf-8")
        assert f"| {side} | 8 | 2 | 77 |" in page.read_text("utf-8")


def test_what_failed_is_told_by_the_exit_code_and_the_page(tmp_path):
    words = ["-m", "tools.gpu", "loss", "--device", "nowhere", "--out", tmp_path]
    done = run([sys.executable, *words, "--page", tmp_path / "gpu.md"], timeout=120)
    assert done.returncode == 1, explain(done)
    assert json.loads((tmp_path / "loss.json").read_text("utf-8"))["exit"]
    assert "## Loss" in (tmp_path / "gpu.md").read_text("utf-8")
