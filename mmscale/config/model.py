"""Settings of the towers, their projections to the shared width, the scale and the fusion model."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from mmscale.config.paths import PathSetting
from mmscale.config.values import Positive, PositiveFloat, Ramp, Section

Kind = Literal["identity", "linear", "mlp", "projector"]
Init = Literal["normal", "orthogonal", "pca", "autoencoder", "cca"]
Activation = Literal["gelu", "relu"]
Depth = Annotated[int, Field(ge=3)]
Shrinkage = Annotated[float, Field(ge=0, le=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]


class HeadSideConfig(Section):
    """What is different about one side's head; null: as in `model.head`."""

    kind: Kind | None = None
    """`model.head.kind` of this side."""
    bias: bool | None = None
    """`model.head.bias` of this side."""
    batch_norm: bool | None = None
    """`model.head.batch_norm` of this side."""
    hidden: Positive | None = None
    """`model.head.hidden` of this side."""
    layers: Depth | None = None
    """`model.head.layers` of this side."""
    activation: Activation | None = None
    """`model.head.activation` of this side."""
    init: Init | None = None
    """`model.head.init` of this side."""
    shrinkage: Shrinkage | None = None
    """`model.head.shrinkage` of this side."""
    dropout: Dropout | None = None
    """`model.head.dropout` of this side."""


class HeadConfig(Section):
    """The projection of each tower's output to the shared width."""

    weights: Literal["taken", "random"] = "taken"
    """With a folder in `model.weights`: `taken` from it, or `random`, as for another width."""
    kind: Kind = "linear"
    """`linear`; `mlp` (one hidden layer); `projector` (more); `identity` where widths agree."""
    bias: bool = False
    """Give linear layers a bias."""
    batch_norm: bool | None = None
    """Normalise over all ranks' rows, after a linear head or each hidden layer; null: projector."""
    hidden: Positive | None = None
    """Width of hidden layers; null: the tower's own."""
    layers: Depth = 3
    """Linear layers of a projector."""
    activation: Activation = "gelu"
    """Between linear layers: `gelu` or `relu`."""
    init: Init = "normal"
    """`normal`, `orthogonal`; fitted on features: `pca`, `autoencoder`; on pairs: `cca`, both."""
    gain: PositiveFloat = 1.0
    """Factor of the first weights; an `autoencoder` trains them on, `cca` has none."""
    unit_rms: bool = False
    """Divide each feature row by the root of its mean square first: ranges then agree unfitted."""
    standardize: Annotated[int, Field(ge=0)] = 0
    """Rows on which each feature's mean and deviation are fitted before the first step; 0 = off."""
    whiten: Literal["none", "zca", "pca"] = "none"
    """Decorrelate features by a matrix fitted before the first step, after `standardize`."""
    shrinkage: Shrinkage = 0.1
    """Share of the identity in the covariances that `whiten` and `cca` invert."""
    fit_rows: Positive = 4096
    """Rows on which `whiten` and `init` are fitted before the first step."""
    dropout: Dropout = 0.0
    """Share of the features that a training step leaves out, after `whiten`; holds few images from
    being learnt by heart."""
    image: HeadSideConfig = HeadSideConfig()
    """Images' head, where it differs."""
    text: HeadSideConfig = HeadSideConfig()
    """Captions' head, where it differs."""

    def of(self, modality: str) -> "HeadConfig":
        """The head of `image` or `text`: its own settings over the common ones."""
        own = self.image if modality == "image" else self.text
        return self.model_copy(update=own.model_dump(exclude_none=True))


def head_faults(head: HeadConfig) -> Iterator[str]:
    """Heads that cannot be fitted together."""
    sides = {name: head.of(name) for name in ("image", "text")}
    canonical = [name for name, side in sides.items() if side.init == "cca"]
    if len(canonical) == 1:
        yield (
            f"model.head.{canonical[0]}.init=cca: it is fitted on pairs, so that both heads must "
            "have it; set model.head.init=cca"
        )
    for name in canonical:
        if sides[name].kind != "linear":
            yield f"model.head.init=cca gives linear heads; set model.head.{name}.kind=linear"


class FusionConfig(Section):
    """Cross-attention between both towers' tokens: matching, classification, re-ranking."""

    enabled: bool | None = None
    """Build it; null: where a term of the objective (`matching`, `classification`) needs it."""
    dim: Positive = 512
    """Width of the cross-attention."""
    layers: Positive = 2
    """Blocks, each with attention both ways."""
    heads: Positive = 8
    """Attention heads; they divide `dim`."""
    classes: Positive | None = None
    """Classes of the classification head; null: none."""


class AdapterConfig(Section):
    """Small matrices beside a tower's weights, learnt in their place (LoRA, through peft)."""

    kind: Literal["none", "lora", "rslora"] = "none"
    """`lora`: rank `rank`, scaled by alpha / rank; `rslora`: by alpha / sqrt(rank)."""
    rank: Positive = 8
    """Width of the matrices."""
    alpha: PositiveFloat = 16.0
    """Factor of what they add, divided by `rank`, or by its root."""
    dropout: Dropout = 0.0
    """Share of their input that a training step leaves out."""
    targets: Literal["auto"] | Annotated[tuple[str, ...], Field(min_length=1)] = "auto"
    """Layers beside which they stand, by the ends of their names; `auto`: each linear one."""


class TowerConfig(Section):
    """One of the two encoders."""

    name: PathSetting | None = None
    """`timm:NAME`, `hf:NAME_OR_PATH` or `openclip:NAME`."""
    weights: PathSetting = "pretrained"
    """`pretrained`, `random`, or a file (safetensors, or torch weights only)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Passed to the tower's constructor, such as `pad_type: same`."""
    frozen: bool | int = False
    """Keep weights, in evaluation mode: all (`true`), the first N blocks, all but the last (-N)."""
    adapter: AdapterConfig = AdapterConfig()
    """Learns beside the weights that are kept: all, or those of the blocks that `frozen` counts."""
    checkpointing: bool = False
    """Compute each block's activations again in the backward pass instead of keeping them."""
    width: Positive | None = None
    """Features that the tower must give, where you want to be sure; its own width is read."""


class VisionConfig(TowerConfig):
    """The image encoder."""

    pooling: Literal["auto", "cls", "mean", "map"] = "auto"
    """How tokens become one vector: `auto` the model's own; `map`: one learnt query attends."""
    mean: float | tuple[float, float, float] | None = None
    """Normalisation mean for pixels in [0, 1]; default the tower's own."""
    std: float | tuple[float, float, float] | None = None
    """Normalisation standard deviation for pixels in [0, 1]; default the tower's own."""


class TextConfig(TowerConfig):
    """The caption encoder."""

    pooling: Literal["auto", "cls", "mean", "eos", "map"] = "auto"
    """How tokens become one vector: `auto` the model's own, else `mean`; `eos`: the last one."""
    context_length: Positive | None = None
    """Most tokens of a caption; default the tower's own, at most 77; more stretches its table."""


# CLIP's bound of its scale.
LARGEST_SCALE = 100.0


class LogitScaleConfig(Section):
    """The inverse temperature: learnt, fixed or scheduled."""

    init: Annotated[float, Field(gt=0)] = 1 / 0.07
    """First value of the scale (1 / temperature); 10 by default with a `siglip` term."""
    max: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"
    """The scale is clamped to [1, max] where it is used; `auto`: 100, or the scale that a whole
    model (`model.preset`) begins with where that is greater, as SigLIP's is."""
    learn: bool = True
    """Learn the scale; without it the scale stays at `init`."""
    course: Ramp | None = None
    """The scale as a ramp, instead of learning it."""
    by_data_size: bool = False
    """Below 1,000 training images start at 0.8 times the temperature: `init` and `course` / 0.8."""
    bias: float | None = None
    """First value of the learnt bias that `siglip` adds to logits; default -10 with that term."""

    @property
    def limit(self) -> float:
        """`max` of a model that begins below it."""
        return LARGEST_SCALE if self.max == "auto" else self.max


class ModelConfig(Section):
    """Two towers, their heads and the logit scale."""

    preset: PathSetting | None = None
    """`small`, `medium`, `medium-mobilebert`, `large`, `hf:NAME`, `openclip:NAME`; words win."""
    weights: PathSetting = "random"
    """A run, checkpoint or export whose weights the run begins with. For `openclip:NAME` also
    `random`, an OpenCLIP tag, a file, or `pretrained`: those in the folder of `local-dir:` or the
    hub's page; for `hf:NAME` `pretrained`, its default, `random` or a file."""
    vision: VisionConfig = VisionConfig()
    """Image encoder."""
    text: TextConfig = TextConfig()
    """Caption encoder."""
    embed_dim: Positive = 512
    """Width shared by images and captions."""
    head: HeadConfig = HeadConfig()
    """Projections."""
    fusion: FusionConfig = FusionConfig()
    """Cross-attention on top of both towers."""
    momentum: Annotated[float, Field(gt=0, lt=1)] = 0.995
    """Decay of the momentum encoder, the running mean of the weights, where something uses it."""
    logit_scale: LogitScaleConfig = LogitScaleConfig()
    """Inverse temperature."""
