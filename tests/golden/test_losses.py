"""Frozen figures of each loss on eight pairs that need no random numbers, in float64.

Where a library computes the same loss, the figure is the library's (named beside it); else it is a
closed form whose special case another figure anchors.
"""

import pytest
import torch
import torch.nn.functional as F

from mmscale.loss.contrast import PairRows
from mmscale.loss.distillation import distillation
from mmscale.loss.hinge import hinge
from mmscale.loss.infonce import infonce, infonce_in_strips
from mmscale.loss.sigmoid import siglip
from mmscale.loss.softmax import dcl, hn_nce, ntxent
from mmscale.loss.spectral import spectral
from mmscale.loss.sphere import alignment, uniformity
from mmscale.loss.statistics import barlow, vicreg
from mmscale.parallel.peers import Alone

PEERS = Alone()
NUM_ROWS = 8
EYE = torch.arange(NUM_ROWS)
IDS = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4])
_I = torch.arange(NUM_ROWS, dtype=torch.float64)[:, None]
_J = torch.arange(6, dtype=torch.float64)[None, :]
RAW_X = torch.sin(0.7 * _I + 0.3 * _J + 0.1 * _I * _J)
RAW_Y = torch.cos(0.5 * _I + 0.2 * _J) + 0.5 * RAW_X
X, Y = F.normalize(RAW_X, dim=1), F.normalize(RAW_Y, dim=1)
CLIP = 1 / 0.07


def of(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


# Name: (computed, figure). open_clip 3.3, lightly 1.6, pytorch-metric-learning 2.9.
GOLDEN = {
    "InfoNCE, distinct ids (open_clip)": (
        lambda: infonce_in_strips(PairRows(X, Y, EYE, PEERS), of(CLIP)),
        0.766957136148,
    ),
    "InfoNCE in tiles, distinct ids (open_clip)": (
        lambda: infonce(PairRows(X, Y, EYE, PEERS), of(CLIP)),
        0.766957136148,
    ),
    "InfoNCE, repeated ids (pytorch-metric-learning SupConLoss, ref_emb)": (
        lambda: infonce_in_strips(PairRows(X, Y, IDS, PEERS), of(CLIP)),
        2.544463819223,
    ),
    "distillation without opinion or queue (InfoNCE)": (
        lambda: distillation(PairRows(X, Y, IDS, PEERS), (X, Y), of(CLIP), alpha=0.0).loss,
        2.544463819223,
    ),
    "SigLIP, bias -10 (open_clip)": (
        lambda: siglip(PairRows(X, Y, EYE, PEERS), of(10), of(-10)),
        2.716321244266,
    ),
    "SigLIP, bias -2.71 (open_clip)": (
        lambda: siglip(PairRows(X, Y, EYE, PEERS), of(10), of(-2.71)),
        6.225911978631,
    ),
    "SigLIP, repeated ids (closed form)": (
        lambda: siglip(PairRows(X, Y, IDS, PEERS), of(10), of(-10)),
        8.131023113835,
    ),
    "NT-Xent, temperature 0.1 (lightly)": (
        lambda: ntxent(PairRows(X, Y, EYE, PEERS), of(10)),
        1.684263313337,
    ),
    "DCL, temperature 0.1 (closed form)": (
        lambda: dcl(PairRows(X, Y, EYE, PEERS), of(10)),
        -0.770830059276,
    ),
    "HN-NCE, beta 0.5 (closed form)": (
        lambda: hn_nce(PairRows(X, Y, EYE, PEERS), of(CLIP), alpha=1.0, beta=0.5),
        1.523447753938,
    ),
    "VICReg (lightly)": (lambda: vicreg(RAW_X, RAW_Y, PEERS), 17.156870209846),
    "Barlow Twins, 0.005 (lightly)": (
        lambda: barlow(RAW_X, RAW_Y, PEERS, redundancy=0.005),
        0.252838572252,
    ),
    "Barlow Twins, 0.0051 (lightly)": (
        lambda: barlow(RAW_X, RAW_Y, PEERS, redundancy=0.0051),
        0.253675373925,
    ),
    "alignment (its authors')": (lambda: alignment(X, Y), 0.467686223122),
    "uniformity (its authors')": (
        lambda: uniformity(PairRows(X, Y, EYE, PEERS)),
        (-2.659414257017 - 1.747047764461) / 2,
    ),
    "spectral, mu 1 (its authors')": (lambda: spectral(X, Y, EYE, PEERS), -1.211634383502),
    "hinge, hardest, summed over the batch (pytorch-metric-learning)": (
        lambda: NUM_ROWS * hinge(PairRows(X, Y, EYE, PEERS)),
        2.153572344408,
    ),
    "hinge, all, summed over the batch (pytorch-metric-learning)": (
        lambda: NUM_ROWS * hinge(PairRows(X, Y, EYE, PEERS), hardness=0.0),
        2.583999724597,
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_figure(name):
    computed, figure = GOLDEN[name]
    assert computed().item() == pytest.approx(figure, abs=1e-11)
