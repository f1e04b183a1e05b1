"""A rank that ends without a word is noticed although nobody waits in an exchange with it."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from mmscale.contracts import World
from mmscale.errors import explained
from mmscale.parallel.failure import failing_together
from mmscale.parallel.world import join_ranks, leave
from tests.ranks.launch import ROOT, start_ranks

SECONDS = 30.0


def main(lives: float, parent: int | None) -> None:
    """The program of a rank: joined, then busy with itself."""
    sys.exit(explained(lambda: _live(lives, parent)))


def _live(lives: float, parent: int | None) -> int:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with failing_together(World(rank, size, rank, "test")):
        join_ranks(World(rank, size, rank, "test"), "gloo", 600)
        if rank == parent and os.fork() == 0:
            # Decoding processes stay for a moment when their parent is killed. Rank 0's hold the
            # ranks' meeting point open for so long, the others' must hold nothing.
            time.sleep(60 if rank else 5)
            os._exit(0)
        print("joined", flush=True)
        time.sleep(lives)
        leave()
    return 0


def _start(size: int, lives: float = 600.0, parent: int | None = None) -> list[subprocess.Popen]:
    program = f"from tests.ranks.test_lifeline import main; main({lives}, {parent})"
    return start_ranks(program, size, address="localhost")


def _ends(ranks: list[subprocess.Popen], seconds: float) -> list[tuple[int, str]]:
    deadline = time.monotonic() + seconds
    told = []
    try:
        for process in ranks:
            process.wait(max(0.1, deadline - time.monotonic()))
            # A child of the killed rank may still hold the other end of its stderr.
            told.append("" if process.returncode < 0 else process.stderr.read())
    finally:
        for process in ranks:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return [(process.returncode, text) for process, text in zip(ranks, told, strict=True)]


@pytest.mark.parametrize(
    ("killed", "with_child"),
    [
        (0, False),
        (1, True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((0, True), (1, False), (2, False), (2, True))
        ),
    ],
)
def test_a_killed_rank_ends_all_others_within_seconds_and_is_named(killed, with_child):
    ranks = _start(3, parent=killed if with_child else None)
    for process in ranks:
        assert process.stdout.readline() == "joined\n"
    ranks[killed].kill()
    ends = _ends(ranks, SECONDS)
    for rank, (code, told) in enumerate(ends):
        if rank == killed:
            continue
        assert code == 6, f"rank {rank}: {code}\n{told}"
        assert f"rank {killed}" in told
        assert "ended without a word" in told
        assert "Traceback" not in told


def test_ranks_that_have_done_their_work_end_in_peace():
    ranks = _start(3, lives=0.1)
    assert [(code, told) for code, told in _ends(ranks, 60)] == [(0, "")] * 3


HANGING = """
import sys, time
import torch.distributed as dist
from mmscale.contracts import World
from mmscale.errors import DataError, explained
from mmscale.parallel.failure import failing_together
from mmscale.parallel.world import join_ranks

def live():
    with failing_together(World()):
        join_ranks(World(), "gloo", 600, alone_too=True)
        # As NCCL does where an exchange was begun that nobody joins.
        dist.destroy_process_group = lambda: time.sleep(600)
        raise {error}

sys.exit(explained(live))
"""


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        ("DataError('x.tar: lies')", 4, "mmscale: x.tar: lies\n"),
        ("ZeroDivisionError('a bug')", 1, "ZeroDivisionError: a bug\n"),
    ],
)
def test_a_failing_rank_ends_although_its_connections_do_not_close(error, code, told):
    ended = subprocess.run(
        [sys.executable, "-c", HANGING.format(error=error)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == code
    assert ended.stderr.endswith(told)
