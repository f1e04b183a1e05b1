"""Settings of what each pair is contrasted with."""

from typing import Annotated, Literal

from pydantic import Field

from mmscale.config.ramp import Ramp, within
from mmscale.config.section import Section

Share = Annotated[Ramp, within(0, 1)]
ALL = Ramp.constant(1.0)
# Sets up to this size get one slot an image; larger ones the latest rows.
WHOLE_SET = 8192
LATEST = 4096


class QueueConfig(Section):
    """Rows of earlier batches as further negatives."""

    size: Literal["auto", "all"] | Annotated[int, Field(ge=0)] = 0
    """Slots, 0 = none; `all`: one for each image; `auto`: `all` up to 8,192 images, else 4,096."""
    source: Literal["momentum", "online"] = "momentum"
    """What encoded the remembered rows: the running mean of the weights, or the weights."""
    share: Share = ALL
    """Share of the slots, the latest, that losses look at; a number or a ramp."""

    def slots(self, images: int) -> tuple[int, bool]:
        """Slots for a set of so many images, and whether each image has one of its own."""
        if self.size == "all" or (self.size == "auto" and images <= WHOLE_SET):
            return images, True
        return (LATEST if self.size == "auto" else int(self.size)), False


class MiningConfig(Section):
    """Which negatives count, by how hard they are; for `infonce`, `siglip` and `dcl`."""

    kind: Literal["none", "hard", "semi_hard"] = "none"
    """`hard`: a row's most similar negatives are mined; `semi_hard`: those of them that are less
    similar than the pair. `hinge` and `hn_nce` have settings of their own for it."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of a row's negatives, those of the queue included, that are mined; at least one."""
    strength: Share = ALL
    """The negatives that are not mined count 1 - strength; a number or a ramp."""


class NegativesConfig(Section):
    """What each pair is contrasted with."""

    gather: bool = True
    """Contrast with the rows of all ranks; without it the loss depends on how the batch is cut."""
    queue: QueueConfig = QueueConfig()
    """Rows of earlier batches."""
    mining: MiningConfig = MiningConfig()
    """Hard negatives."""
