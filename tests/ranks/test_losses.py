"""Every loss on 1, 2 and 4 real ranks: the value and the gradient of one process.

Engines average gradients over ranks; here that is done by hand, so that each loss is alone.
"""

import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from mmscale.contracts import World
from mmscale.loss import strips
from mmscale.loss.contrast import PairRows
from mmscale.loss.infonce import infonce
from mmscale.parallel.peers import Group
from tests.ranks.launch import run_on_ranks
from tests.unit.loss.cases import TERMS, WITH_BANK, leaves, made_up, share, value_and_gradients

# Twelve rows, so that four ranks have three each; an image's captions lie on several ranks.
IDS = torch.tensor([0, 4, 1, 2, 0, 2, 3, 4, 4, 5, 0, 6])
CASES = [(name, False) for name in TERMS] + [(name, True) for name in WITH_BANK]


def _every_loss():
    """This rank's part of each case: the ranks' mean value and averaged gradient."""
    world = World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    if world.size == 4:
        # Its three rows in strips of one or two, against those of one process in one.
        strips.CPU_LOGITS = 2 * len(IDS)
    results = {}
    for name, with_bank in CASES:

        def own_share(leaf, with_bank=with_bank):
            return share(made_up(leaf, IDS, 1, with_bank), world.rank, world.size)

        value, gradients = value_and_gradients(name, leaves(IDS), own_share, Group(world))
        for tensor in (value, *gradients.values()):
            # Rows of other ranks have no gradient here: the sum puts the pieces together.
            dist.all_reduce(tensor)
            tensor /= world.size
        results[name, with_bank] = value, gradients
    return results


# How the most used trainers gather, and what becomes of the gradient when it is averaged over two
# ranks: cosine with one process's, size of it, size of the scale's; None: not a fixed number.
SCHEMES = {
    "ours": (1.0, 1.0, 1.0),
    "open_clip default": (1.0, 0.5, 1.0),
    "open_clip gather_with_grad": (1.0, 1.0, 1.0),
    "open_clip local_loss": (None, None, None),
    "open_clip local_loss gather_with_grad": (1.0, 1.0, 1.0),
}


def _clip(scheme, image, text, scale, rank, world):
    if scheme == "ours":
        ids = torch.arange(len(image)) + rank * len(image)
        return infonce(PairRows(image, text, ids, Group(World(rank, world))), scale)
    from open_clip.loss import ClipLoss

    theirs = ClipLoss(
        local_loss="local_loss" in scheme,
        gather_with_grad="gather_with_grad" in scheme,
        rank=rank,
        world_size=world,
    )
    return theirs(image, text, scale[0])


def _truth_table():
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    generator = torch.Generator().manual_seed(0)
    pixels, tokens = (torch.randn(16, 8, generator=generator, dtype=torch.float64) for _ in "12")
    tower = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    own = slice(rank * 16 // world, (rank + 1) * 16 // world)
    table = {}
    for scheme in SCHEMES:
        # One tower for both sides: its gradient is all there is.
        weight = tower.clone().requires_grad_()
        scale = torch.tensor([10.0], dtype=torch.float64, requires_grad=True)
        image, text = (F.normalize(rows[own] @ weight, dim=1) for rows in (pixels, tokens))
        loss = _clip(scheme, image, text, scale, rank, world)
        found = torch.autograd.grad(loss, (weight, scale))
        for gradient in found:
            dist.all_reduce(gradient)
            gradient /= world
        table[scheme] = found[0].flatten(), found[1].item()
    return table


def _rank():
    return _every_loss(), _truth_table() if int(os.environ["WORLD_SIZE"]) < 4 else None


@pytest.fixture(scope="module")
def worlds():
    """Each number of processes is started once."""
    return {world: run_on_ranks(world, _rank) for world in (1, 2, 4)}


@pytest.mark.parametrize("world", [2, 4])
def test_loss_and_gradient_are_those_of_one_process(worlds, world):
    joint = worlds[1][0][0]
    for results, _ in worlds[world]:
        for case in CASES:
            (value, gradients), (wanted, whole) = results[case], joint[case]
            torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-12, msg=str(case))
            size = torch.stack([gradient.norm() for gradient in whole.values()]).norm()
            assert size > 0, case
            for key, gradient in gradients.items():
                assert (gradient - whole[key]).norm() / size < 1e-9, (case, key)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradient_truth_table(worlds, scheme):
    tower, scale = worlds[2][0][1][scheme]
    joint, joint_scale = worlds[1][0][1]["ours"]
    cosine = F.cosine_similarity(tower, joint, dim=0).item()
    size, scale_size = (tower.norm() / joint.norm()).item(), scale / joint_scale
    wanted = SCHEMES[scheme]
    if wanted[0] is None:
        # The direction itself is wrong.
        assert cosine < 0.99
        return
    assert (cosine, size, scale_size) == pytest.approx(wanted, rel=1e-9)
