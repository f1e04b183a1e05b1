"""The objective: a weighted sum of terms."""

from collections import Counter

import torch
from torch import Tensor

from mmscale.config.loss import AnyTerm, PrototypesTerm
from mmscale.config.ramp import Ramp, StepsOf, whole_steps
from mmscale.config.schema import Config
from mmscale.contracts import LossInput, LossOutput, Peers
from mmscale.dist.peers import Alone
from mmscale.loss.mining import Mining
from mmscale.loss.reference import Facts, reference
from mmscale.loss.terms import compute


class Objective:
    """Computes this rank's share of the objective from the embeddings of its rows."""

    def __init__(self, config: Config, peers: Peers, steps_of: StepsOf = whole_steps):
        """Take the terms of a run.

        Args:
            config: The run.
            peers: All ranks.
            steps_of: A duration in updates of this run, by which ramps are read.
        """
        self._terms = named(config.loss.terms)
        self._peers: Peers = peers if config.negatives.gather else Alone()
        self._steps_of = steps_of
        self._mining = config.negatives.mining

    def __call__(self, rows: LossInput) -> LossOutput:
        """Mean over this rank's rows of each term, and their weighted sum. Collective.

        Beside a term's value stand its floor, its chance value and a weight that changes, each
        where there is one. A term of weight 0 is not computed, nor prototypes before there are any.

        Raises:
            ConfigError: A term needs what this run does not make.
        """

        def at(ramp: Ramp) -> float:
            return ramp.at(rows.step, self._steps_of)

        peers = _Remembering(self._peers)
        facts, mining = Facts.of(rows, peers), Mining.of(self._mining, at)
        # In the graph also where every weight is 0.
        total = 0 * rows.image.unit.sum() + 0 * rows.text.unit.sum()
        values: dict[str, Tensor] = {}
        for name, term in self._terms.items():
            weight = at(term.weight)
            if weight == 0 or _waits(term, rows):
                continue
            computed = compute(term, rows, peers, at, mining)
            total = total + weight * computed.loss
            floor, chance = reference(term, facts, at, mining)
            beside = {
                name: computed.loss.detach(),
                f"{name}_floor": floor if computed.floor is None else computed.floor,
                f"{name}_chance": chance,
                f"{name}_weight": None if term.weight.is_constant else weight,
            }
            values |= {
                key: torch.as_tensor(value, dtype=torch.float64)
                for key, value in beside.items()
                if value is not None
            }
        return LossOutput(total, values)


def _waits(term: AnyTerm, rows: LossInput) -> bool:
    """Whether the term's first clusters are still to come: at the end of the first epoch."""
    return isinstance(term, PrototypesTerm) and rows.prototypes == ()


def named(terms: tuple[AnyTerm, ...]) -> dict[str, AnyTerm]:
    """Each term by its kind; the second of a kind is `kind_2`."""
    seen: Counter[str] = Counter()
    names: dict[str, AnyTerm] = {}
    for term in terms:
        seen[term.kind] += 1
        names[term.kind + (f"_{seen[term.kind]}" if seen[term.kind] > 1 else "")] = term
    return names


class _Remembering:
    """Peers that gather a tensor once, however many terms ask for its columns."""

    def __init__(self, peers: Peers):
        self._peers = peers
        self.rank, self.size = peers.rank, peers.size
        self._gathered: dict[int, tuple[Tensor, Tensor]] = {}

    def columns(self, rows: Tensor) -> Tensor:
        # The tensor is kept with its columns: else another could take its place in memory.
        if id(rows) not in self._gathered:
            self._gathered[id(rows)] = rows, self._peers.columns(rows)
        return self._gathered[id(rows)][1]

    def total(self, value: Tensor) -> Tensor:
        return self._peers.total(value)

    def logsumexp(self, value: Tensor) -> Tensor:
        return self._peers.logsumexp(value)

    def first_row(self, num_rows: int) -> int:
        return self._peers.first_row(num_rows)
