"""The objective: a weighted sum of terms."""

from collections import Counter
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from mmscale.config.loss import AnyTerm
from mmscale.config.schema import Config
from mmscale.config.values import Ramp, StepsOf, whole_steps
from mmscale.contracts import LossInput, LossOutput, Peers
from mmscale.loss.mining import Mining
from mmscale.loss.term import Counts, Given, TermValue, compute
from mmscale.parallel.peers import Alone


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
        self._precision = config.loss.precision

    def __call__(self, rows: LossInput) -> LossOutput:
        """Mean over this rank's rows of each term, and their weighted sum. Collective.

        Beside a term's value stands a weight that changes and, on updates that are logged, its
        floor and chance value, each where there is one. A term of weight 0 is not computed, nor one
        whose input is still to come.

        Raises:
            ConfigError: A term needs what this run does not make.
        """

        def at(ramp: Ramp) -> float:
            return ramp.at(rows.step, self._steps_of)

        peers = _Remembering(self._peers)
        given = Given(rows, peers, at, Mining.of(self._mining, at), self._precision)

        @cache
        def counts(with_queue: bool) -> Counts:
            return Counts.of(rows if with_queue else replace(rows, bank=None), peers)

        # In the graph also where every weight is 0.
        total = 0 * rows.image.unit.sum() + 0 * rows.text.unit.sum()
        values: dict[str, Tensor] = {}
        for name, term in self._terms.items():
            weight = at(term.weight)
            value = compute(term, given) if weight else None
            if value is None:
                continue
            total = total + weight * value.loss
            values[name] = value.loss.detach().double()
            if not term.weight.is_constant:
                values[f"{name}_weight"] = torch.as_tensor(weight, dtype=torch.float64)
            if rows.is_logged:
                values |= _bounds(name, value, counts(term.needs.queue))
        return LossOutput(total, values)


@torch.no_grad()
def _bounds(name: str, value: TermValue, counts: Counts) -> dict[str, Tensor]:
    """Floor and chance of a term, by the names they are logged under."""
    return {
        f"{name}_{which}": torch.as_tensor(bound, dtype=torch.float64)
        for which, bound in value.bounds(counts)._asdict().items()
        if bound is not None
    }


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
