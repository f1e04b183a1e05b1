import os
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks.launch import RankError, run_on_ranks


def _sum_of_ranks(offset: int) -> tuple[int, int, str]:
    value = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(value)
    return dist.get_rank(), int(value), os.environ["MARK"]


def _rank_1_raises() -> None:
    if dist.get_rank() == 1:
        raise ValueError("the second rank's own words")
    dist.barrier()


def _rank_1_exits() -> None:
    if os.environ["RANK"] == "1":
        sys.exit(7)


def _rank_1_hangs() -> None:
    if os.environ["RANK"] == "1":
        time.sleep(600)


def test_results_come_in_rank_order():
    done = run_on_ranks(2, _sum_of_ranks, 10, env={"MARK": "x"})
    assert done == [(0, 21, "x"), (1, 21, "x")]


def test_a_failing_rank_raises_here_with_its_traceback():
    with pytest.raises(RankError, match="the second rank's own words") as caught:
        run_on_ranks(2, _rank_1_raises)
    assert "_rank_1_raises" in caught.value.reports[1]


def test_an_exiting_rank_is_a_failure():
    with pytest.raises(RankError, match="SystemExit: 7") as caught:
        run_on_ranks(2, _rank_1_exits, join=False)
    assert set(caught.value.reports) == {1}


def test_a_hanging_rank_is_killed():
    begun = time.monotonic()
    with pytest.raises(RankError, match="still running"):
        run_on_ranks(2, _rank_1_hangs, join=False, timeout=6)
    assert time.monotonic() - begun < 40
