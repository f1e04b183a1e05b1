"""What rooms hand to one another: plain frozen records, and the ranks as losses see them.

Shape letters, fixed for the whole project: `b` rows on this rank, `n` rows over all ranks, `d`
shared embedding width, `f` feature width of a tower, `t` tokens, `c h w` channels, height and
width. `scale` is 1/temperature everywhere.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

COMPONENTS = ("vision", "text", "head", "fusion", "scale")
# Matrices and kernels learn apart from what has one dimension: biases, norms, the scale.
KINDS = ("weights", "biases")
PARTS = tuple(f"{component}_{kind}" for component in COMPONENTS for kind in KINDS)


@dataclass(frozen=True)
class World:
    """The processes of a run as the launcher promised them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launcher: str = "none"

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes and prints."""
        return self.rank == 0


@dataclass(frozen=True)
class Position:
    """A place in the training stream: what comes next follows from it, the seed and the manifest.

    Attributes:
        epoch: Whole passes over the data already finished.
        rows: Rows of this epoch already taken, over all ranks.
    """

    epoch: int = 0
    rows: int = 0


@dataclass(frozen=True)
class InputSpec:
    """What a model wants to be fed; `model` fills it, `data` obeys it.

    Attributes:
        image_size: Side of the square crop, pixels.
        mean: Per-channel mean of the normalisation, for pixels in [0, 1].
        std: Per-channel standard deviation of the normalisation.
        interpolation: `bicubic` or `bilinear`.
        tokenize: Captions to token ids, untrimmed of nothing but padding: one list of ints each.
        pad_token: Id that fills rows shorter than the longest.
        context_length: Most tokens a caption may have; longer ones are cut by `tokenize`.
        unknown_token: Id that stands for words without tokens; None where every text has some.
        resize: How a whole picture becomes the square: its `shortest` side to the size and the
            middle cut out, its `longest` side and black around it, or `squash`: both sides.
        caption_lengths: Tokens that a batch's captions are padded to, the first that is enough; ()
            for as many as its longest has.
        teachers: What each frozen teacher of the objective is fed, by its name; their tokens are
            made with the model's own.
    """

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    tokenize: Callable[[Sequence[str]], list[list[int]]]
    pad_token: int
    context_length: int
    unknown_token: int | None = None
    resize: str = "shortest"
    caption_lengths: tuple[int, ...] = ()
    teachers: Mapping[str, "InputSpec"] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """A rank's rows of one global batch; row i of every field is one image-caption pair.

    Attributes:
        image: Pixels: bytes until they are on the device, normalised there. Or the image tower's
            features, where they are cached.
        tokens: Token ids trimmed to the longest caption at hand, or the text tower's cached
            features.
        mask: True on real tokens; None with cached features.
        image_ids: Identity of each row's image.
        match_ids: What defines positives: rows with equal ids are never negatives of each other.
            The image ids, unless `data.match` says otherwise.
        labels: Class of each row, -1 where it has none.
        keys: `KEY#caption` of each row.
        captions: The caption texts.
        cut: How many of these captions have more tokens than the tower takes.
        damaged: One line for each sample of these rows that could not be decoded and was replaced.
        teacher_tokens: Token ids of the captions as each teacher reads them, by its name; -1 behind
            the last.
        teacher_features: What the towers of a teacher made of the pictures and captions, where that
            is cached.
    """

    image: UInt8[Tensor, "b c h w"] | Float[Tensor, "b c h w"] | Float[Tensor, "b f"]
    tokens: Int64[Tensor, "b t"] | Float[Tensor, "b g"]
    mask: Bool[Tensor, "b t"] | None
    image_ids: Int64[Tensor, " b"]
    match_ids: Int64[Tensor, " b"]
    labels: Int64[Tensor, " b"]
    keys: list[str]
    captions: list[str]
    cut: int = 0
    damaged: list[str] = field(default_factory=list)
    teacher_tokens: Mapping[str, Int64[Tensor, "b u"]] = field(default_factory=dict)
    teacher_features: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class Embeddings:
    """One modality's rows on their way through the model.

    Attributes:
        raw: Tower output.
        projected: Head output.
        unit: Head output divided by its norm.
    """

    raw: Float[Tensor, "b f"]
    projected: Float[Tensor, "b d"]
    unit: Float[Tensor, "b d"]


@dataclass(frozen=True)
class Features:
    """What both towers gave for a rank's rows; row i belongs together.

    Attributes:
        image: Pooled image features.
        text: Pooled caption features.
        image_sequence: The image tower's tokens, where fusion wants them.
        text_sequence: The text tower's tokens, in the places of the batch's mask.
    """

    image: Float[Tensor, "b f"]
    text: Float[Tensor, "b g"]
    image_sequence: Float[Tensor, "b s v"] | None = None
    text_sequence: Float[Tensor, "b t w"] | None = None


@dataclass(frozen=True)
class Matched:
    """What the fusion model made of pairs of a rank's rows.

    Attributes:
        logits: No match and match, of each pair.
        targets: Which pairs match: 0 or 1.
        class_logits: Of each row's own pair; None without classes.
    """

    logits: Float[Tensor, "m 2"]
    targets: Int64[Tensor, " m"]
    class_logits: Float[Tensor, "b classes"] | None = None


@dataclass(frozen=True)
class Bank:
    """Rows remembered from earlier batches, equal on every rank: negatives without a gradient.

    Attributes:
        image: Unit rows.
        text: Unit rows.
        ids: Match id of each slot; -1 in a slot that is not filled yet.
    """

    image: Float[Tensor, "k d"]
    text: Float[Tensor, "k d"]
    ids: Int64[Tensor, " k"]


@dataclass(frozen=True)
class Prototypes:
    """One clustering of the training images by what the momentum encoder sees in them.

    Attributes:
        centres: Unit rows.
        temperature: Of each cluster: large where its members lie far from the centre.
        cluster: Cluster of each of this rank's rows, -1 where its image was not clustered.
    """

    centres: Float[Tensor, "c d"]
    temperature: Float[Tensor, " c"]
    cluster: Int64[Tensor, " b"]


# The teacher that is the run's own start; no model is named so.
START = ":start"


@dataclass(frozen=True)
class Taught:
    """What a frozen teacher makes of a rank's rows, without a graph.

    Attributes:
        image: Unit rows, of the teacher's own width.
        text: Unit rows.
        scale: 1 / the teacher's temperature.
    """

    image: Float[Tensor, "b e"]
    text: Float[Tensor, "b e"]
    scale: Float[Tensor, "1"]


@dataclass(frozen=True)
class LossInput:
    """All that the objective is computed from: what the engine's step made of this rank's rows.

    Attributes:
        image: The images' embeddings.
        text: The captions' embeddings; row i belongs to image i.
        ids: Match ids: rows with equal ids are positives of each other.
        scale: 1 / temperature.
        step: Updates taken so far; what schedules are read at.
        is_logged: Floors and chance values of the terms are wanted.
        labels: Class of each row, -1 where it has none.
        momentum_image: Unit rows of the momentum encoder for the same images, without a graph.
        momentum_text: Likewise for the captions.
        bank: Remembered rows; None without a queue.
        matching: Fusion's logits (no match, match) of `m` pairs.
        matching_targets: Which of these pairs match: 0 or 1.
        class_logits: Fusion's or the images' class logits.
        bias: Added to each logit by losses that judge every pair alone; None without one.
        prototypes: Clusterings of the training images, one a number of clusters; () in the first
            epoch, None where the run makes none.
        teachers: What each teacher that a term looks at now makes of the same rows, by its name;
            `START` is the model as the run began.
        beside: Rows that passed the model beside the batch's, by the name of what they are for.
        distance: Squared distance of the weights to the start's, a sum over parameters: what this
            rank's share adds to the mean over ranks, without a graph; None where no term wants it.
    """

    image: Embeddings
    text: Embeddings
    ids: Int64[Tensor, " b"]
    scale: Float[Tensor, "1"]
    step: int = 0
    is_logged: bool = True
    labels: Int64[Tensor, " b"] | None = None
    momentum_image: Float[Tensor, "b d"] | None = None
    momentum_text: Float[Tensor, "b d"] | None = None
    bank: Bank | None = None
    matching: Float[Tensor, "m 2"] | None = None
    matching_targets: Int64[Tensor, " m"] | None = None
    class_logits: Float[Tensor, "b classes"] | None = None
    bias: Float[Tensor, "1"] | None = None
    prototypes: tuple[Prototypes, ...] | None = None
    teachers: Mapping[str, Taught] = field(default_factory=dict)
    beside: Mapping[str, "LossInput"] = field(default_factory=dict)
    distance: Float[Tensor, ""] | None = None


@dataclass(frozen=True)
class LossOutput:
    """This rank's objective.

    Attributes:
        total: Weighted sum of the terms over this rank's rows; nats for the contrastive terms.
        terms: Each term alone, unweighted and without a graph; beside it its weight where that
            changes, and its floor and chance value on updates that are logged.
    """

    total: Float[Tensor, ""]
    terms: dict[str, Float[Tensor, ""]]


@dataclass(frozen=True)
class StepRecord:
    """What one update measured, the same on every rank.

    Attributes:
        loss: Objective of the global batch.
        terms: Each term of the global batch, as in `LossOutput`.
        lr: Base learning rate that the update used.
        logit_scale: Clamped scale before the update.
        grad_norm: Norm of the whole gradient before clipping, by component and in all (`total`).
        grad_norm_parts: The same by `PARTS`: weights and biases apart.
        keys_digest: Order-free digest of the global batch's `KEY#caption`s.
        applied: False where the update was skipped because something was not finite.
        damaged: Rows of the global batch that stood in for undecodable samples.
        cut: Captions of the global batch that have more tokens than the tower takes.
        tokens: Caption tokens of the global batch that went through the text tower.
        stop: True when any rank was told to stop.
        written: True when every rank has done its part of the checkpoint in flight.
    """

    loss: float
    terms: dict[str, float]
    lr: float
    logit_scale: float
    grad_norm: dict[str, float]
    grad_norm_parts: dict[str, float]
    keys_digest: str
    applied: bool
    damaged: int
    cut: int
    tokens: int
    stop: bool
    written: bool = False


@runtime_checkable
class Peers(Protocol):
    """The ranks that contrast together. Convention of the gradients: `parallel/peers.py`."""

    rank: int
    size: int

    def columns(self, rows: Tensor) -> Tensor:
        """Rows of all ranks in rank order, [b ...] -> [n ...]; differentiable."""

    def total(self, value: Tensor) -> Tensor:
        """Element-wise sum over ranks; differentiable."""

    def logsumexp(self, value: Tensor) -> Tensor:
        """Element-wise log-sum-exp over ranks; differentiable."""

    def first_row(self, num_rows: int) -> int:
        """Where this rank's `num_rows` rows begin among the columns."""


@dataclass(frozen=True)
class NamedTensor:
    """A parameter or buffer as an engine holds it, whole.

    Attributes:
        name: Its name in the model.
        value: fp32 master weights of a trained parameter; else the tensor itself.
        moments: Optimizer state by name (`exp_avg`, `exp_avg_sq`); empty before the first update,
            and for what is not trained.
        trained: It is a trained parameter.
    """

    name: str
    value: Tensor
    moments: dict[str, Tensor]
    trained: bool = False
