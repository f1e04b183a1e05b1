"""Settings of the optimizer and its rates."""

from typing import Annotated, Any, Literal

from pydantic import Field

from mmscale.config.duration import Duration
from mmscale.config.section import NonNegativeFloat, Positive, PositiveFloat, Section

Decay = Annotated[float, Field(gt=0, le=1)]


class ComponentScales(Section):
    """A factor for each part of the model."""

    vision: NonNegativeFloat = 1.0
    """Image tower."""
    text: NonNegativeFloat = 1.0
    """Text tower."""
    head: NonNegativeFloat = 1.0
    """Projections."""
    fusion: NonNegativeFloat = 1.0
    """Cross-attention and its heads."""
    scale: NonNegativeFloat = 1.0
    """Logit scale."""


class LayerDecayConfig(Section):
    """A factor of the rate for each layer of a tower that lies deeper, counted from its output."""

    vision: Decay = 1.0
    """Image tower: layer k from the output has this to the power k; 1 = all alike."""
    text: Decay = 1.0
    """Text tower, likewise."""


class PlateauConfig(Section):
    """`optim.schedule=plateau`: the rate falls when `stop.metric` no longer rises."""

    patience: Positive = 3
    """Evaluations without a new best after which the rate falls."""
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """What the rate is multiplied with then."""


class BalanceConfig(Section):
    """Slows the tower down that moves too fast beside the other."""

    band: tuple[PositiveFloat, PositiveFloat] | None = None
    """Allowed ratio of the image tower's relative update to the text tower's; null: off."""
    every: Positive = 10
    """Updates between two measurements."""


class OptimConfig(Section):
    """The optimizer and its rates."""

    name: str = "adamw"
    """`adamw`, `sgd`, `lion`, `lamb` or another optimizer of timm's list (docs/training.md)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Passed to the optimizer's constructor, such as `momentum: 0.9`."""
    lr: Annotated[float, Field(gt=0)] = 5e-4
    """Learning rate after warm-up, before the scales."""
    weight_decay: NonNegativeFloat = 0.1
    """Decay, decoupled in AdamW and Lion; never on norms, biases and the logit scale."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates of the moments, where the optimizer has two."""
    eps: Annotated[float, Field(gt=0)] = 1e-6
    """What keeps the division by the second moment finite, where the optimizer has one."""
    warmup: Duration = Duration(100, "steps")
    """Linear rise of the rate from zero; cut to the length of the run or stage."""
    schedule: Literal["cosine", "linear", "constant", "plateau"] = "cosine"
    """Course of the rate after warm-up; `plateau`: constant until `optim.plateau` lowers it."""
    plateau: PlateauConfig = PlateauConfig()
    """When the rate falls, and how far."""
    balance: BalanceConfig = BalanceConfig()
    """Balance of the two towers."""
    lr_scale: ComponentScales = ComponentScales()
    """Factors of the rate by component."""
    layer_decay: LayerDecayConfig = LayerDecayConfig()
    """Factors of a tower's rate by depth."""
    weight_decay_scale: ComponentScales = ComponentScales()
    """Factors of the decay by component."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the whole gradient; null: no clipping."""
