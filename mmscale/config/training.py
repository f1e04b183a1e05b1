"""Settings of how a run learns: optimizer, negatives, stages, and what watches or ends it."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mmscale.config.values import (
    Duration,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Ramp,
    Section,
    within,
)

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
    """`adamw`, `sgd`, `lion`, `lamb` or another of those that docs/training.md lists."""
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


class StopConfig(Section):
    """What ends a run before its time."""

    metric: str = "eval/mean"
    """Figure of the evaluations that early stopping, plateaus and stages' patience watch, such as
    `eval/NAME/mean` of a named set."""
    patience: Positive | None = None
    """Evaluations without a new best after which the run ends as if complete; null: never."""
    above_chance: Positive | None = 500
    """Updates after warm-up whose mean loss must lie below chance, else exit 3; null: no guard."""
    rise: Annotated[float, Field(gt=1)] | None = None
    """Exit 3 when the mean loss of 50 updates is so many times the lowest such mean; null: off."""


Verdict = Literal[
    "complete_collapse",
    "dead_tower",
    "dimensional_collapse",
    "shuffled_pairs",
    "unaligned",
    "scale_saturated",
    "scale_stuck_low",
    "overfit",
    "forgetting",
    "false_negatives",
    "hubness",
]


def _without_remedy(action: Any) -> Any:
    if action == "remedy":
        raise ValueError(
            "off, warn or halt: a run no longer changes its own settings; start it again with the "
            "words that doctor.json recommends"
        )
    return action


class GuardConfig(Section):
    """What a run does when its probes find the embedding space failing."""

    action: Annotated[Literal["off", "warn", "halt"], BeforeValidator(_without_remedy)] = "warn"
    """`warn`: say so; `halt`: end with exit 3, a checkpoint and `doctor.json`."""
    patience: Annotated[int, Field(ge=2)] = 3
    """Probes in a row that must find the same before it counts; evaluations, for `forgetting`."""
    grace: Duration = Duration(200, "steps")
    """Beginning of the run in which only a contraction of the space counts: an untrained model is
    unaligned."""
    verdicts: tuple[Verdict, ...] = (
        "complete_collapse",
        "dead_tower",
        "dimensional_collapse",
        "shuffled_pairs",
        "unaligned",
        "forgetting",
    )
    """Which verdicts count."""


class ProbeConfig(Section):
    """Figures of the embedding space and of the update, taken while training."""

    every: Duration = Duration(50, "steps")
    """How often the global batch and as many fixed held-out pairs are measured."""
    held_out: Positive = 256
    """Held-out pairs of each probe, no more than the global batch."""
