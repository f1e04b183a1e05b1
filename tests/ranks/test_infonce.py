"""InfoNCE in tiles on real ranks: the mean of their losses and its gradient are one process's."""

import pytest
import torch
from torch.nn.functional import normalize

from mmscale.contracts import Bank, World
from mmscale.loss import tiles
from mmscale.loss.contrast import PairRows
from mmscale.loss.infonce import infonce, infonce_in_strips
from mmscale.parallel.peers import Alone, connect
from tests.ranks.launch import run_on_ranks

ROWS, WIDTH = 24, 5
# Tiles smaller than any rank's share, of which the first is kept.
SIDE = 5


def joint_problem():
    """Images with captions on several ranks, and a bank that is partly filled and shares ids."""
    generator = torch.Generator().manual_seed(3)
    image, text, old_image, old_text = (
        normalize(torch.randn(count, WIDTH, generator=generator, dtype=torch.float64))
        for count in (ROWS, ROWS, 13, 13)
    )
    ids = torch.randint(0, 15, (ROWS,), generator=generator)
    slots = torch.randint(-1, 20, (13,), generator=generator)
    return image, text, ids, Bank(old_image, old_text, slots)


def loss_and_gradients(loss, rows, peers, scale, with_bank):
    image, text, ids, bank = joint_problem()
    image, text = image[rows].requires_grad_(), text[rows].requires_grad_()
    scale = torch.tensor([scale], dtype=torch.float64, requires_grad=True)
    bank = bank if with_bank else None
    value = loss(PairRows(image, text, ids[rows], peers, bank), scale)
    value.backward()
    return value.item(), image.grad, text.grad, scale.grad


def on_a_rank(cases):
    import torch.distributed as dist

    tiles.CPU_SIDE, tiles.KEPT_BYTES = SIDE, SIDE * SIDE * 8
    world = World(dist.get_rank(), dist.get_world_size(), 0, "test")
    share = ROWS // world.size
    rows = slice(world.rank * share, (world.rank + 1) * share)
    return [loss_and_gradients(infonce, rows, connect(world), *case) for case in cases]


# The last scale needs a shift of each row's and column's own.
CASES = [(14.3, False), (100.0, True), (60.0, True), (3000.0, True)]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_give_the_loss_and_gradient_of_one_process(world):
    ranks = run_on_ranks(world, on_a_rank, CASES)
    for place, case in enumerate(CASES):
        wanted = loss_and_gradients(infonce_in_strips, slice(None), Alone(), *case)
        values, images, texts, scales = zip(*(rank[place] for rank in ranks), strict=True)
        rounding = 1e-12 + 4 * torch.finfo(torch.float64).eps * case[0] ** 2
        assert sum(values) / world == pytest.approx(wanted[0], rel=1e-12, abs=1e-12)
        # Engines average gradients over ranks.
        for parts, whole in ((torch.cat(images), wanted[1]), (torch.cat(texts), wanted[2])):
            torch.testing.assert_close(parts / world, whole, rtol=1e-11, atol=rounding)
        torch.testing.assert_close(sum(scales) / world, wanted[3], rtol=1e-11, atol=rounding)
