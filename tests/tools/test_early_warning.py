"""A space that collapses is caught early; one that contracts and recovers is left alone.

The hardest negative alone from the first step on (VSE++), over two towers' features of one meaning:
at a rate of 1e-2 both heads fall into one point while the loss still sinks, at 1e-3 they come near
each other for a while and part again.
"""

import pytest
import torch

from mmscale.diagnostics.doctor import judge
from mmscale.diagnostics.geometry import health_figures
from mmscale.diagnostics.pairing import pairing_figures
from mmscale.diagnostics.persistence import Persistence
from mmscale.diagnostics.retrieval import recalls
from mmscale.parallel.peers import Alone
from tools.studies.given import Features, Model, without_data

PATIENCE = 3
WORDS = (
    'loss.terms=[{"kind": "hinge"}]',
    "model.head.kind=mlp",
    "model.head.bias=true",
    "model.head.hidden=256",
    "model.embed_dim=128",
    "train.global_batch_size=128",
    "optim.schedule=constant",
    "optim.warmup=1 steps",
    "optim.clip_norm=null",
    "engine.device=cpu",
)


def pairs(part, num):
    """Two noisy views of one latent meaning; parts share the views."""
    world, drawn = (torch.Generator().manual_seed(seed) for seed in (7, part))
    views = [torch.randn(32, 128, generator=world) / 32**0.5 for _ in range(2)]
    meaning = torch.randn(num, 32, generator=drawn)
    rows = [
        (meaning @ view + 0.5 * torch.randn(num, 128, generator=drawn)).relu() for view in views
    ]
    return Features(*rows, torch.arange(num))


def mean_recall(embedded):
    """Of R@1, 5 and 10 both ways: R@1 alone is a handful of pairs while a space collapses."""
    found = recalls(embedded, Alone())
    return sum(value for name, value in found.items() if "_r" in name) / 6


def watched(lr, steps, every, seed):
    """Variance, recall within the sample and alarm at each probe."""
    config = without_data([*WORDS, f"optim.lr={lr}", f"run.seed={seed}"])
    model, held_out = Model(config, pairs(0, 4096)), pairs(1, 256)
    persistence = Persistence(PATIENCE, 10**6, ("complete_collapse", "dead_tower"))
    probes = []

    def probe(step, model):
        if step % every:
            return
        embedded = model.embed(held_out)
        figures = health_figures(embedded) | pairing_figures(embedded)
        if step == 0:
            persistence.begin(figures)
            return
        alarm = persistence.take(step, figures, judge(figures))
        width = max(figures["health/variance_image"], figures["health/variance_text"])
        probes.append((width, mean_recall(embedded), alarm))

    model.train(steps, probe)
    model.close()
    return probes


@pytest.mark.parametrize("seed", range(3))
def test_a_collapse_is_caught_within_ten_probes(seed):
    probes = watched(1e-2, 24, 1, seed)
    when = next(place for place, (*_, alarm) in enumerate(probes) if alarm is not None)
    assert when < 10
    assert probes[when][2].diagnosis.verdict == "complete_collapse"
    recall = [found for _, found, _ in probes[: when + 1]]
    assert recall[-1] >= max(recall) / 2, "before recall halves"
    assert probes[-1][0] < 0.05, "it was a collapse"


@pytest.mark.parametrize("seed", range(3))
def test_a_contraction_that_recovers_raises_nothing(seed):
    probes = watched(1e-3, 45, 3, seed)
    widths = [width for width, *_ in probes]
    assert min(widths) < 0.75 * widths[0], "it contracted"
    assert widths[-1] > 1.2 * min(widths), "and recovered"
    assert not [alarm for *_, alarm in probes if alarm is not None]
    assert probes[-1][1] > 50
