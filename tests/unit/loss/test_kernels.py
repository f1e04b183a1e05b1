"""The Triton kernels: right in Triton's interpreter, compiled without a card, absent from a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmscale.loss import kernels
from mmscale.loss.contrast import PairRows
from mmscale.loss.infonce import infonce
from mmscale.loss.term import terms
from mmscale.parallel.peers import Alone
from tests.whole.command import ROOT

pytest.importorskip("triton")
# Against float64: of the loss, and of the gradients to rows and columns.
LIMITS = {"fp32": 1e-5, "bf16": 2e-2}


def run(module: str, **variables: str) -> str:
    environment = {**os.environ, **variables}
    words = [sys.executable, "-m", module]
    done = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def told() -> list[dict]:
    return json.loads(run("tests.unit.loss.interpreted", TRITON_INTERPRET="1"))


@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize("name", ["infonce", "siglip"])
def test_losses_and_gradients_of_the_kernels_are_those_in_float64(told, name, precision):
    """Blocks that are not full, all ids alike, scale 100, with a queue's columns; twice alike."""
    cases = [case for case in told if (case["name"], case["precision"]) == (name, precision)]
    assert len(cases) == 12
    for case in cases:
        assert max(case["value"], *case["gradients"], *case["numbers"]) <= LIMITS[precision], case


@pytest.mark.slow
def test_the_kernels_compile_for_a_card_that_is_not_here(tmp_path: Path):
    """To machine code, with tensor cores for bf16; nothing is added to from two sides."""
    found = json.loads(run("tests.unit.loss.compiled", TRITON_CACHE_DIR=str(tmp_path)))
    assert len(found) == 12
    for kernel in found:
        assert kernel["bytes"] > 0
        assert not kernel["adds_in_memory"], kernel
        assert kernel["tensor_cores"] == (kernel["inputs"] == "bf16"), kernel


def test_kernels_are_not_imported_where_there_is_no_card():
    terms()
    rows = torch.eye(4, requires_grad=True)
    infonce(PairRows(rows, rows, torch.arange(4), Alone()), torch.tensor([9.0])).backward()
    assert not kernels.run_on(rows)
    assert not any(name.startswith("mmscale.loss.kernels.") for name in sys.modules)
