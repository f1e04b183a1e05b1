"""What a term of the objective is in code: settings, a loss over a rank's rows, and its bounds.

A term is one function with `@term(ItsSettings)` over it, in a file of this folder; what it needs of
the run stands with its settings in `config/loss.py`. Every file of the folder is looked through, so
that a term is listed nowhere else.
"""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mmscale.config.loss import AnyTerm, Precision
from mmscale.config.term import Term
from mmscale.config.values import Ramp
from mmscale.contracts import LossInput, Peers
from mmscale.errors import ConfigError
from mmscale.loss.contrast import PairRows
from mmscale.loss.mining import Mining

S = TypeVar("S", bound=Term)
T = TypeVar("T")
Number: TypeAlias = Float[Tensor, ""] | float


class Bounds(NamedTuple):
    """The least a term can be, and what it is for a model that tells no pair from another.

    Each is None where the term has none, or none that can be computed from the batch's counts.
    """

    floor: Number | None = None
    chance: Number | None = None


@dataclass(frozen=True)
class Counts:
    """What bounds depend on, over the rows of all ranks; fp64, on the rows' device.

    Attributes:
        positives: Columns of each row's own id in the batch.
        negatives: What columns of other ids count together, remembered ones included.
        remembered: Remembered columns of the row's own id.
        width: Shared embedding width.
    """

    positives: Float[Tensor, " n"]
    negatives: Float[Tensor, " n"]
    remembered: Float[Tensor, " n"]
    width: int

    def __len__(self) -> int:
        return len(self.positives)

    @classmethod
    def of(cls, rows: LossInput, peers: Peers) -> "Counts":
        """Of one global batch. Collective."""
        ids = peers.columns(rows.ids)
        positives = _count_in(ids, ids)
        remembered, filled = torch.zeros_like(positives), positives.new_zeros(())
        if rows.bank is not None:
            # Identities are never negative, so that an empty slot is nobody's.
            remembered = _count_in(ids, rows.bank.ids)
            filled = (rows.bank.ids >= 0).sum().double()
        negatives = len(ids) + filled - positives - remembered
        return cls(positives, negatives, remembered, rows.image.unit.shape[1])


class TermValue(NamedTuple):
    """A term of one update.

    Attributes:
        loss: Mean over this rank's rows.
        bounds: Computes floor and chance; called on the updates that are logged. Collective.
    """

    loss: Float[Tensor, ""]
    bounds: Callable[[Counts], Bounds] = lambda counts: Bounds()


@dataclass(frozen=True)
class Given:
    """What a term is computed from.

    Attributes:
        rows: What the engine made of this rank's rows; the queue only for terms that look at it.
        peers: The ranks that contrast together.
        at: A ramp's value now.
        mining: Which negatives count, for terms that mine; None: all alike.
        precision: Of the products of rows and columns.
    """

    rows: LossInput
    peers: Peers
    at: Callable[[Ramp], float]
    mining: Mining | None = None
    precision: Precision = "fp32"

    @property
    def pairs(self) -> PairRows:
        """The unit rows, to be contrasted."""
        rows = self.rows
        return PairRows(
            rows.image.unit, rows.text.unit, rows.ids, self.peers, rows.bank, self.precision
        )

    @property
    def projected(self) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]]:
        """The heads' outputs for images and captions, before they are made unit rows."""
        return self.rows.image.projected, self.rows.text.projected

    def scale(self, temperature: float | None = None) -> Float[Tensor, "1"]:
        """1 / temperature: the term's own, or else the model's."""
        scale = self.rows.scale
        return scale if temperature is None else torch.full_like(scale, 1 / temperature)

    def needed(self, value: T | None, term: AnyTerm, what: str) -> T:
        """A value that the run must have made.

        Raises:
            ConfigError: It has not.
        """
        if value is None:
            raise ConfigError(
                f"loss.terms holds {term.kind}, but this run makes no {what}; remove the term"
            )
        return value

    def of_mined(self, bounds: Callable[[Counts], Bounds]) -> Callable[[Counts], Bounds]:
        """The bounds where mined negatives count more than others.

        How many negatives lie behind the pair of a model that knows nothing is chance itself:
        semi-hard mining leaves no chance value.
        """
        mining = self.mining
        if mining is None:
            return bounds

        def mined(counts: Counts) -> Bounds:
            effective = mining.effective(counts.negatives)
            found = bounds(replace(counts, negatives=effective))
            return found if mining.kind == "hard" else Bounds(found.floor)

        return mined


Compute: TypeAlias = Callable[[Any, Given], TermValue | None]
_TERMS: dict[type[Term], Compute] = {}


def term(
    settings: type[S],
) -> Callable[[Callable[[S, Given], TermValue | None]], Callable[[S, Given], TermValue | None]]:
    """Make a function the term of these settings.

    It returns None while the run has not yet made what the term is computed from.
    """

    def register(
        compute: Callable[[S, Given], TermValue | None],
    ) -> Callable[[S, Given], TermValue | None]:
        if settings in _TERMS:
            raise ValueError(f"{settings.__name__} has a term already")
        _TERMS[settings] = compute
        return compute

    return register


@cache
def terms() -> dict[type[Term], Compute]:
    """Every term by the class of its settings."""
    package = __name__.rpartition(".")[0]
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        import_module(f"{package}.{module.name}")
    return _TERMS


def compute(settings: Term, given: Given) -> TermValue | None:
    """A term over this rank's rows; it sees no queue and no mining that it does not ask for.

    Raises:
        ConfigError: The run does not make what the term needs.
    """
    needs, rows = settings.needs, given.rows
    seen = replace(
        given,
        rows=rows if needs.queue or rows.bank is None else replace(rows, bank=None),
        mining=given.mining if needs.mining else None,
    )
    return terms()[type(settings)](settings, seen)


def log_mean(counts: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """Mean log of the rows' counts; a row that counts none adds nothing."""
    return counts.where(counts > 0, torch.ones_like(counts)).log().mean()


def _count_in(ids: Int64[Tensor, " n"], among: Int64[Tensor, " m"]) -> Float[Tensor, " n"]:
    """How often each id occurs among others, without an [n m] table."""
    ordered = among.sort().values
    first, last = (torch.searchsorted(ordered, ids, right=right) for right in (False, True))
    return (last - first).double()
