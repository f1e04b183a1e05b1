"""Settings of the projections to the shared width, and of the fusion model on top."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from mmscale.config.section import Positive, PositiveFloat, Section

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
