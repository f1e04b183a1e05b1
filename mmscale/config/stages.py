"""Settings of a run's stages: stretches with other trained parts, rates, terms or batches."""

from typing import Any, Literal

from pydantic import Field

from mmscale.config.duration import Duration
from mmscale.config.section import Positive, Section


class UnfreezeConfig(Section):
    """Blocks that join what is trained, from the output, part by part."""

    towers: tuple[Literal["vision", "text"], ...] = ("vision", "text")
    """Whose blocks."""
    blocks: Positive = 1
    """Blocks of each tower that join in every part."""
    parts: Positive
    """Equal parts that the stage is cut into; each is a stage of its own."""


class StageConfig(Section):
    """One stage; what it does not say is as in the rest of the configuration."""

    name: str
    """Name for the log."""
    duration: Duration
    """Length; the last stage lasts until the run ends."""
    patience: Positive | None = None
    """Evaluations without a new best of `stop.metric` after which the next stage begins early."""
    train: tuple[str, ...] = ("*",)
    """What is trained: components (`head`), blocks (`vision[-2:]`), or names with `*` and `?`."""
    unfreeze: UnfreezeConfig | None = None
    """Progressive unfreezing, in addition to `train`."""
    optim: dict[str, Any] = Field(default_factory=dict)
    """Settings of `optim` that differ."""
    loss: dict[str, Any] = Field(default_factory=dict)
    """Another `loss`, in place of the run's."""
    negatives: dict[str, Any] = Field(default_factory=dict)
    """Settings of `negatives` that differ."""
    data: dict[str, Any] = Field(default_factory=dict)
    """Settings that differ of `data.augment`, `crop_scale`, `feature_cache`, `hard_batches`."""
    global_batch_size: Positive | None = None
    """`train.global_batch_size` of this stage; another one begins with a new pass over the data."""
    micro_batch_size: Literal["auto"] | Positive | None = None
    """`train.micro_batch_size` of this stage."""
