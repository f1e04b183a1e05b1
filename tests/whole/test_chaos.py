"""A run that is killed again and again ends with the weights of one that nobody touched."""

import sys

import pytest

from tests.whole.command import ROOT, explain, run


@pytest.mark.slow
def test_killed_runs_end_bit_for_bit_as_an_uninterrupted_one():
    words = [sys.executable, ROOT / "tools" / "chaos.py", "--kills", "2", "--steps", "20"]
    done = run(words, timeout=900)
    assert done.returncode == 0, explain(done)
    assert "all 20 steps, weights and moments equal bit for bit" in done.stdout
    assert done.stdout.count("| in a save |") >= 1, "the seed strikes a save too"
