"""Mined negatives: which they are, what the others count, and that a positive is never one."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmscale.config.load import validate
from mmscale.contracts import Bank
from mmscale.errors import ConfigError
from mmscale.loss.contrast import PairRows, direction
from mmscale.loss.infonce import infonce, infonce_in_strips
from mmscale.loss.mining import Mining
from mmscale.loss.objective import Objective
from mmscale.loss.sigmoid import siglip
from mmscale.loss.softmax import dcl
from mmscale.parallel.peers import Alone
from tests.unit.loss.cases import leaves, made_up

IDS = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4])


def unit_rows(seed, rows=8, width=6):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=1)


X, Y = unit_rows(0), unit_rows(1)
BANK = Bank(unit_rows(2, 5), unit_rows(3, 5), torch.tensor([-1, 2, 50, 0, 51]))
PAIRS = PairRows(X, Y, IDS, Alone(), BANK)
SCALE, BIAS = torch.tensor([11.0], dtype=torch.float64), torch.tensor([-4.0], dtype=torch.float64)
LOSSES = {
    "infonce": lambda mining: infonce_in_strips(PAIRS, SCALE, mining=mining),
    "smoothed": lambda mining: infonce_in_strips(PAIRS, SCALE, smoothing=0.2, mining=mining),
    "dcl": lambda mining: dcl(PAIRS, SCALE, mining=mining),
    "siglip": lambda mining: siglip(PAIRS, SCALE, BIAS, mining=mining),
    "siglip without a bank": lambda mining: siglip(
        replace(PAIRS, bank=None), SCALE, BIAS, mining=mining
    ),
}


def by_loops(kind, share, strength, loss):
    """Mean of both directions, column by column."""
    total = 0.0
    for rows, columns, more in ((X, Y, BANK.text), (Y, X, BANK.image)):
        for i in range(8):
            positives = [float(rows[i] @ columns[j]) for j in range(8) if IDS[j] == IDS[i]]
            negatives = [float(rows[i] @ columns[j]) for j in range(8) if IDS[j] != IDS[i]]
            negatives += [
                float(rows[i] @ more[j]) for j in range(5) if BANK.ids[j] not in (-1, IDS[i])
            ]
            pair = float(rows[i] @ columns[i])
            candidates = sorted(s for s in negatives if kind == "hard" or s < pair)
            kept = candidates[len(candidates) - math.ceil(share * len(candidates)) :]
            counts = [1.0 if s in kept else 1 - strength for s in negatives]
            total += loss(positives, list(zip(negatives, counts, strict=True)))
    return total / 16


def infonce_of(positives, negatives):
    everything = sum(math.exp(11 * s) for s in positives)
    everything += sum(count * math.exp(11 * s) for s, count in negatives)
    return math.log(everything) - 11 * sum(positives) / len(positives)


def dcl_of(positives, negatives):
    everything = sum(count * math.exp(11 * s) for s, count in negatives)
    return math.log(everything) - 11 * sum(positives) / len(positives) if everything else 0.0


def siglip_of(positives, negatives):
    total = sum(math.log1p(math.exp(-(11 * s - 4))) for s in positives)
    return total + sum(count * math.log1p(math.exp(11 * s - 4)) for s, count in negatives)


@pytest.mark.parametrize("kind", ["hard", "semi_hard"])
@pytest.mark.parametrize(("share", "strength"), [(0.01, 1.0), (0.3, 1.0), (0.3, 0.25), (1.0, 0.5)])
@pytest.mark.parametrize(
    ("name", "loss"), [("infonce", infonce_of), ("dcl", dcl_of), ("siglip", siglip_of)]
)
def test_mined_losses_are_those_of_slow_loops(kind, share, strength, name, loss):
    found = LOSSES[name](Mining(kind, share, strength)).item()
    assert found == pytest.approx(by_loops(kind, share, strength, loss), rel=1e-10)


@pytest.mark.parametrize("name", LOSSES)
def test_mining_at_strength_0_or_share_1_is_the_plain_loss(name):
    plain = LOSSES[name](None).item()
    for mining in (Mining("hard", 0.3, 0.0), Mining("semi_hard", 0.3, 0.0), Mining("hard", 1, 1)):
        assert LOSSES[name](mining).item() == pytest.approx(plain, rel=1e-12)
    assert LOSSES[name](Mining("hard", 0.3, 0.5)).item() != pytest.approx(plain, rel=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    ids=st.lists(st.integers(0, 3), min_size=1, max_size=8),
    slots=st.lists(st.integers(-1, 5), min_size=1, max_size=6),
    kind=st.sampled_from(["hard", "semi_hard"]),
    share=st.floats(0.01, 1),
    seed=st.integers(0, 99),
)
def test_a_positive_is_never_mined_and_at_least_one_negative_is(ids, slots, kind, share, seed):
    rows, ids = len(ids), torch.tensor(ids)
    # Partners of the row's own image are its nearest columns by far.
    points = unit_rows(seed, 4, 6)[ids]
    noise = 0.01 * unit_rows(seed + 1, rows)
    remembered = unit_rows(seed + 2, len(slots))
    way = direction(
        F.normalize(points + noise), F.normalize(points), ids, Alone(), remembered,
        torch.tensor(slots),
    ).contrast()  # fmt: skip
    mined = Mining(kind, share, 1.0)(way)
    columns = torch.cat([ids, torch.tensor(slots)])
    same = ids[:, None] == columns[None, :]
    assert not (mined.negative & same).any()
    assert not mined.negative[:, columns < 0].any()
    assert torch.equal(mined.positive, way.positive)
    candidates = way.negative
    if kind == "semi_hard":
        candidates = candidates & (way.similarity < way.pair[:, None])
    assert not (mined.negative & ~candidates).any()
    assert torch.equal(mined.negative.any(1), candidates.any(1))
    hardest = way.similarity.masked_fill(~candidates, -2).argmax(1)
    assert mined.negative[torch.arange(rows), hardest][candidates.any(1)].all()


def objective(mining, *terms):
    return Objective(
        validate(
            {
                "data": {"train": "unused"},
                "loss": {"terms": list(terms)},
                "negatives": {"mining": mining},
            }
        ),
        Alone(),
    )


def test_strength_is_a_schedule_and_at_zero_the_plain_loss():
    ramp = {"from": 0, "to": 1, "over": "4 steps", "start": "1 steps"}
    sums = objective({"kind": "hard", "share": 0.3, "strength": ramp}, {"kind": "infonce"})
    rows = made_up(leaves(IDS), IDS)

    def at(step):
        return sums(replace(rows, step=step)).terms["infonce"].item()

    pairs = PairRows(rows.image.unit, rows.text.unit, IDS, Alone())
    assert at(1) == infonce(pairs, rows.scale).item()
    for step, strength in ((3, 0.5), (5, 1.0), (9, 1.0)):
        mining = Mining("hard", 0.3, strength)
        wanted = infonce_in_strips(pairs, rows.scale, mining=mining).item()
        assert at(step) == pytest.approx(wanted, rel=1e-12)


def test_mining_leaves_terms_that_do_not_need_it_alone():
    rows = made_up(leaves(IDS), IDS)
    terms = [{"kind": "infonce"}, {"kind": "hinge"}, {"kind": "hn_nce"}, {"kind": "ntxent"}]
    mined = objective({"kind": "hard"}, *terms)(rows).terms
    plain = objective({"kind": "none"}, *terms)(rows).terms
    changed = {name for name in plain if mined[name] != plain[name]}
    assert changed == {"infonce", "infonce_chance"}


@pytest.mark.parametrize("strength", [0.4, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_floor_and_chance_under_mining_follow_the_counted_negatives(strength, smoothing):
    """Of ten rows with ten columns: logits that know nothing, and the best ones there are."""
    ids = torch.tensor([0, 0, 1, 2, 3, 4, 5, 6, 7, 8])
    term = {"kind": "infonce", "label_smoothing": smoothing}
    mining = {"kind": "hard", "share": 0.25, "strength": strength}
    rows = made_up(leaves(ids), ids)
    terms = objective(mining, term)(rows).terms
    chance = floor = 0.0
    for same in ids[:, None] == ids[None, :]:
        # A quarter of 8 or 9 negatives, rounded up.
        mined = (~same).nonzero()[: 2 if same.sum() == 2 else 3, 0]
        weight = torch.full((10,), 1 - strength, dtype=torch.float64)
        weight[same] = weight[mined] = 1
        target = smoothing * weight / weight.sum() + (1 - smoothing) * same / same.sum()

        def loss(logits, weight=weight, target=target):
            return (logits + weight.log()).logsumexp(0) - (target * logits).nan_to_num(0.0).sum()

        chance += loss(torch.zeros(10).double()).item() / 10
        best = (target / weight).nan_to_num(1.0).log().clamp(min=-99)
        floor += loss(best).item() / 10
        for seed in range(3):
            assert loss(best + 0.1 * unit_rows(seed, 1, 10)[0]) > loss(best) - 1e-12
    assert terms["infonce_chance"].item() == pytest.approx(chance)
    assert terms["infonce_floor"].item() == pytest.approx(floor)
    semi = objective({**mining, "kind": "semi_hard"}, term)(rows).terms
    assert semi["infonce_floor"].item() == pytest.approx(floor)
    assert "infonce_chance" not in semi


def test_mining_that_no_term_does_is_refused():
    with pytest.raises(ConfigError, match=r"negatives\.mining\.kind=hard, but no term"):
        objective({"kind": "hard"}, {"kind": "hinge"})
