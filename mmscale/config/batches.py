"""Settings of batches that are built on purpose."""

from typing import Annotated, Literal

from pydantic import Field

from mmscale.config.section import Positive, Section


class HardBatchesConfig(Section):
    """Images that are hard to tell apart, brought into one batch."""

    table: str | None = None
    """npz of `mmscale embed`, or npz/safetensors of `image_ids` and `neighbours`; null: off."""
    by: Literal["image", "text"] = "image"
    """Which embeddings of `table` are compared, where it holds no `neighbours`."""
    share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of a batch's images that are brought in as neighbours of others."""
    window: Positive = 32
    """Batches among which images change places, for `data.positive_share` too."""
