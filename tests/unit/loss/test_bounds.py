"""Floor and chance values against the losses themselves."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mmscale.config.loss import TERMS, LossConfig
from mmscale.config.values import whole_steps
from mmscale.contracts import Bank, Embeddings, LossInput, Taught
from mmscale.loss.term import Bounds, Counts, Given, compute
from mmscale.parallel.peers import Alone
from tests.unit.loss.cases import TERMS as CASES
from tests.unit.loss.cases import leaves, made_up
from tests.whole.command import ROOT

IDS = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4])


def term(kind, **options):
    return LossConfig.model_validate({"terms": [{"kind": kind, **options}]}).terms[0]


def at(ramp):
    return ramp.at(0, whole_steps)


def rows_of(unit, bank=None, scale=30.0, bias=None, **more):
    # For losses of outputs that are not unit rows too.
    embedded = Embeddings(unit, unit, unit)
    scale = torch.tensor([scale], dtype=torch.float64)
    return LossInput(embedded, embedded, IDS, scale, bank=bank, bias=bias, **more)


def one_point(with_bank, **more):
    """A model that tells nothing apart."""
    unit = torch.ones(8, 1, dtype=torch.float64)
    slots = torch.tensor([-1, 2, 7, 9, 0])
    points = torch.ones(5, 1, dtype=torch.float64)
    return rows_of(unit, Bank(points, points, slots) if with_bank else None, **more)


def value_of(settings, rows):
    """The term's loss and its bounds."""
    value = compute(settings, Given(rows, Alone(), at))
    bounds = value.bounds(Counts.of(rows, Alone()))
    return value.loss.item(), Bounds(*(b if b is None else float(b) for b in bounds))


def check(settings, rows, which):
    wanted, bounds = value_of(settings, rows)
    assert getattr(bounds, which) == pytest.approx(wanted, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("with_bank", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        term("infonce"),
        term("infonce", label_smoothing=0.2),
        term("dcl"),
        term("hn_nce", alpha=0.5, beta=1.0),
        term("hn_nce", alpha=0.0),
        term("hinge", hardness=0.4),
        term("hinge", semi_hard=True),
        term("ntxent"),
        term("supcon", base_temperature=0.1),
        term("supcon", temperature=0.2, base_temperature=0.1),
        term("spectral"),
        term("spectral", mu=4.0),
        term("uniformity"),
    ],
    ids=lambda settings: settings.kind,
)
def test_chance_is_the_loss_of_a_model_that_tells_nothing_apart(settings, with_bank):
    if settings.kind == "spectral" and settings.mu > 1:
        # The best a constant product can do is 1.
        assert value_of(settings, one_point(False))[1].chance == -1 / 4
        return
    check(settings, one_point(with_bank), "chance")


@pytest.mark.parametrize("with_bank", [False, True])
def test_chance_of_siglip_is_its_loss_at_the_best_bias(with_bank):
    settings, best = term("siglip"), math.inf
    for logit in torch.linspace(-3, 1, 41).tolist():
        bias = torch.tensor([logit - 30.0], dtype=torch.float64)
        rows = one_point(with_bank, bias=bias)
        loss, (_, chance) = value_of(settings, rows)
        best = min(best, loss)
    assert chance == pytest.approx(best, rel=1e-3)
    assert chance <= best


@pytest.mark.parametrize("with_bank", [False, True])
def test_chance_of_distillation_counts_positives_in_the_queue(with_bank):
    rows = one_point(with_bank)
    ones = rows.image.unit
    rows = rows_of(ones, rows.bank, momentum_image=ones, momentum_text=ones)
    check(term("distillation"), rows, "chance")


@pytest.mark.parametrize(
    "settings", [term("teacher", model="one"), term("teacher", model="one", temperature=0.2)]
)
def test_a_teacher_is_matched_at_the_floor_and_met_by_chance(settings):
    """0 where both find the same alike; at chance its own rows tell nothing of ours."""
    rows = made_up(leaves(IDS), IDS)
    own = Taught(
        rows.image.unit,
        rows.text.unit,
        1 / torch.tensor([settings.temperature or 1 / 7], dtype=torch.float64),
    )
    loss, bounds = value_of(settings, replace(rows, teachers={"one": own}))
    assert loss == pytest.approx(bounds.floor, abs=1e-12)
    assert bounds.chance > 0
    ones = torch.ones(8, 1, dtype=torch.float64)
    check(settings, rows_of(ones, teachers={"one": own}), "chance")


def test_a_teacher_of_unrelated_rows_is_met_by_chance():
    rows, settings = made_up(leaves(IDS), IDS), term("teacher", model="one", form="feature")
    image, text = (F.pad(side.unit, (0, 6)) for side in (rows.image, rows.text))
    other = Taught(image.roll(6, 1), text.roll(6, 1), rows.scale)
    wide = replace(rows, image=Embeddings(image, image, image), text=Embeddings(text, text, text))
    check(settings, replace(wide, teachers={"one": other}), "chance")
    check(settings, replace(wide, teachers={"one": Taught(image, text, rows.scale)}), "floor")


@pytest.mark.parametrize(
    "settings",
    [
        term("infonce"),
        term("hn_nce", alpha=0.5, beta=0.0),
        term("supcon"),
        term("ntxent"),
        term("hinge"),
        term("spectral"),
        term("alignment"),
        term("regression"),
    ],
    ids=lambda settings: settings.kind,
)
def test_floor_is_the_loss_of_a_model_that_knows_every_image(settings):
    own = F.one_hot(IDS).double()
    check(settings, rows_of(own, scale=1e4), "floor")


def test_floor_of_smoothed_targets_is_their_entropy():
    """Reached where the softmax is the target."""
    smoothing, counts = 0.2, torch.tensor([2, 2, 1, 3, 3, 3, 1, 1])
    target = (IDS[:, None] == IDS[None, :]).double() / counts[:, None]
    target = (1 - smoothing) * target + smoothing / 8
    entropy = torch.special.entr(target).sum(1).mean().item()
    _, found = value_of(term("infonce", label_smoothing=smoothing), one_point(False))
    assert found.floor == pytest.approx(entropy)


def test_matching_and_classification_at_chance():
    targets = torch.tensor([1, 1, 0, 0, 0, 0])
    rows = one_point(
        False,
        matching=torch.zeros(6, 2),
        matching_targets=targets,
        class_logits=torch.zeros(8, 5),
        labels=torch.zeros(8, dtype=torch.int64),
    )
    entropy = math.log(3) - 2 / 3 * math.log(2)
    assert value_of(term("matching"), rows)[1].chance == pytest.approx(entropy)
    assert value_of(term("classification"), rows)[1].chance == pytest.approx(math.log(5))


def test_a_term_has_the_bounds_that_the_table_of_the_documentation_gives_it():
    """What is empty there is None here, and never a silent 0."""
    table = (ROOT / "docs" / "losses.md").read_text("utf-8").split("\n| kind | of | queue ")[1]
    documented = {}
    for line in table.split("\n\n")[0].splitlines()[2:]:
        kinds, _, queue, floor, chance = (cell.strip() for cell in line.strip("|").split("|"))
        for kind in kinds.replace("`", "").split(", "):
            known = tuple(cell not in ("", "none") for cell in (floor, chance))
            documented[kind] = queue.startswith("yes"), *known
    assert documented.keys() == TERMS.keys()
    rows = made_up(leaves(IDS), IDS, with_bank=True)
    for kind, wanted in documented.items():
        bounds = compute(term(kind, **CASES[kind]), Given(rows, Alone(), at)).bounds(
            Counts.of(rows, Alone())
        )
        found = TERMS[kind].needs.queue, *(bound is not None for bound in bounds)
        assert found == wanted, kind
