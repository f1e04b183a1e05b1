"""Settings of batches that are built on purpose."""

from typing import Annotated, Literal

from mmscale.config.paths import PathSetting
from mmscale.config.ramp import Ramp, within
from mmscale.config.section import Positive, Section

# As `table`: the run's own model.
OWN_MODEL = "self"


class HardBatchesConfig(Section):
    """Images that are hard to tell apart, brought into one batch."""

    table: PathSetting | None = None
    """npz of `mmscale embed`, or npz/safetensors of `image_ids` and `neighbours`; `self`: what the
    model finds alike as the run or stage begins; null: off."""
    by: Literal["image", "text"] = "image"
    """Which embeddings of `table` are compared, where it holds no `neighbours`."""
    share: Annotated[Ramp, within(0, 1)] = Ramp.constant(0.5)
    """Share of a batch's images brought in as neighbours of others; a ramp counts the data's own
    batches, from the run's first."""
    window: Positive = 32
    """Batches among which images change places, for `data.positive_share` too."""
