"""What every term of the objective has: its weight, and what it asks of the run."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from mmscale.config.values import Ramp, Section, within

Share = Annotated[Ramp, within(0, 1)]
AtLeastZero = Annotated[Ramp, within(0)]
ONE, ZERO = Ramp.constant(1.0), Ramp.constant(0.0)


@dataclass(frozen=True)
class Needs:
    """What a term asks of the run, beside two towers and their heads.

    Attributes:
        gathers: Modalities whose rows of all ranks it contrasts with.
        queue: It contrasts with the rows of earlier batches, where the run keeps them.
        mining: `negatives.mining` says which of its negatives count.
        momentum: Rows of the momentum encoders.
        pictures: The batch's pixels and captions, for a frozen teacher to encode.
        start: The weights that the run began with, kept in every checkpoint.
        fusion: The head of the fusion model whose logits it takes.
        labels: Labels in the data.
        logit_scale: Scale and bias of the logits that its authors start from; it needs the bias.
        once: Why the objective cannot hold it twice, and what to do instead; None: it can.
    """

    gathers: tuple[Literal["image", "text"], ...] = ()
    queue: bool = False
    mining: bool = False
    momentum: bool = False
    pictures: bool = False
    start: bool = False
    fusion: Literal["matching", "classes"] | None = None
    labels: bool = False
    logit_scale: tuple[float, float] | None = None
    once: str | None = None


BOTH: tuple[Literal["image", "text"], ...] = ("image", "text")


class Term(Section):
    """What every term has."""

    needs: ClassVar[Needs] = Needs()

    weight: AtLeastZero = ONE
    """Factor of this term in the objective; a number or a ramp. At 0 it is not computed."""

    def contrasts_in(self, mined: bool) -> Literal["tiles", "strips"] | None:
        """How it goes through the logits of its rows and all columns; None: it has none.

        In tiles one product serves both directions. Strips hold some rows' logits with all columns.

        Args:
            mined: `negatives.mining` is at work.
        """
        return "strips" if self.needs.gathers else None
