"""Settings of the objective: a list of terms, or one of the named lists.

A term has its settings here, with what it needs of the run, and its function in `mmscale/loss`.
"""

from typing import Annotated, Any, ClassVar, Literal, TypeAlias, get_args

from pydantic import Field, model_validator

from mmscale.config.taught import AnchorTerm, L2StartTerm, TeacherTerm
from mmscale.config.term import BOTH, ONE, ZERO, AtLeastZero, Needs, Share, Term
from mmscale.config.values import NonNegativeFloat, Positive, PositiveFloat, Ramp, Section


class InfoNCETerm(Term):
    """Symmetric multi-positive InfoNCE by id."""

    needs: ClassVar[Needs] = Needs(gathers=BOTH, queue=True, mining=True)

    kind: Literal["infonce"]
    """CLIP's loss, with every caption of one image a positive."""
    temperature: PositiveFloat | None = None
    """A temperature of its own, fixed; null: the model's."""
    label_smoothing: Share = ZERO
    """Share of the target that is spread evenly over all columns; a number or a ramp."""

    def contrasts_in(self, mined: bool) -> Literal["tiles", "strips"]:
        """Strips only where a mean or an order of all logits is asked for."""
        return "strips" if mined or self.label_smoothing != ZERO else "tiles"


class SigLIPTerm(Term):
    """Sigmoid loss of each pair alone."""

    needs: ClassVar[Needs] = Needs(
        gathers=BOTH,
        queue=True,
        mining=True,
        # Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", section 3.2.
        logit_scale=(10.0, -10.0),
    )

    kind: Literal["siglip"]
    """Needs the logits' bias (`model.logit_scale.bias`)."""


class DCLTerm(Term):
    """Decoupled contrastive loss across modalities."""

    needs: ClassVar[Needs] = Needs(gathers=BOTH, queue=True, mining=True)

    kind: Literal["dcl"]
    """InfoNCE without the positives in the denominator; has no floor."""
    temperature: PositiveFloat | None = None
    """A temperature of its own, fixed; null: the model's, which this loss drives to its limit."""


class NTXentTerm(Term):
    """SimCLR's loss over images and captions as two views."""

    needs: ClassVar[Needs] = Needs(gathers=BOTH)

    kind: Literal["ntxent"]
    """Also contrasts images with images and captions with captions."""
    temperature: PositiveFloat | None = None
    """A temperature of its own, fixed; null: the model's."""


class SupConTerm(Term):
    """Supervised contrastive loss over images and captions as two views."""

    needs: ClassVar[Needs] = Needs(gathers=BOTH)

    kind: Literal["supcon"]
    """Every row of the same id, in both modalities, is a positive."""
    temperature: PositiveFloat | None = None
    """A temperature of its own, fixed; null: the model's."""
    base_temperature: PositiveFloat | None = None
    """Multiplies the loss by temperature / base_temperature as its authors do; null: no factor."""


class HingeTerm(Term):
    """Margin ranking loss (VSE++)."""

    needs: ClassVar[Needs] = Needs(gathers=BOTH, queue=True)

    kind: Literal["hinge"]
    """Each negative's similarity must stay a margin below the pair's."""
    margin: PositiveFloat = 0.2
    """Distance that negatives keep."""
    hardness: Share = ONE
    """From all negatives (0) to only the hardest (1); a number or a ramp, to begin gently."""
    semi_hard: bool = False
    """Let the hardest be the hardest of those less similar than the pair."""


class HardNegativeTerm(Term):
    """InfoNCE with negatives weighted by their hardness (HN-NCE)."""

    needs: ClassVar[Needs] = Needs(gathers=BOTH, queue=True)

    kind: Literal["hn_nce"]
    """Negatives weigh more the more similar they are."""
    alpha: NonNegativeFloat = 1.0
    """Share of the positives in the denominator."""
    beta: AtLeastZero = Ramp.constant(0.5)
    """Concentration on hard negatives; 0 weighs all alike; a number or a ramp."""
    temperature: PositiveFloat | None = None
    """A temperature of its own, fixed; null: the model's."""


class SpectralTerm(Term):
    """Spectral contrastive loss on the heads' outputs."""

    needs: ClassVar[Needs] = Needs(gathers=BOTH)

    kind: Literal["spectral"]
    """Has no temperature; rows longer than sqrt(mu) are shortened to it."""
    mu: PositiveFloat = 1.0
    """Largest squared length of a row."""


class PrototypesTerm(Term):
    """Each row must find its image's cluster."""

    needs: ClassVar[Needs] = Needs(
        momentum=True, once="name every number of clusters in one term's clusters"
    )

    kind: Literal["prototypes"]
    """Clusters of the momentum encoder's image features, made anew each epoch, after the first."""
    clusters: tuple[Annotated[int, Field(gt=1)], ...] = (256,)
    """Numbers of clusters; the loss is the mean over them."""
    temperature: PositiveFloat = 0.2
    """Mean temperature of the clusters."""


class VICRegTerm(Term):
    """Invariance, variance and covariance of the heads' outputs."""

    kind: Literal["vicreg"]
    """On outputs before they are made unit rows, with statistics of the global batch."""
    invariance: NonNegativeFloat = 25.0
    """Factor of the mean squared distance of pairs."""
    variance: NonNegativeFloat = 25.0
    """Factor of the hinge that keeps each dimension's deviation above 1."""
    covariance: NonNegativeFloat = 1.0
    """Factor of the squared covariances between dimensions."""


class BarlowTerm(Term):
    """Cross-correlation of the two modalities to the identity."""

    kind: Literal["barlow"]
    """On outputs before they are made unit rows, with statistics of the global batch."""
    redundancy: NonNegativeFloat = 0.0051
    """Factor of the correlations between different dimensions."""


class DecorrelationTerm(Term):
    """Squared correlations between a modality's dimensions."""

    kind: Literal["decorrelation"]
    """Sum over pairs of dimensions, divided by the width; mean of both modalities."""


class AlignmentTerm(Term):
    """Squared distance of the unit rows of a pair."""

    kind: Literal["alignment"]
    """2 for unrelated rows, 0 for equal ones."""


class UniformityTerm(Term):
    """How evenly each modality's rows cover the sphere."""

    needs: ClassVar[Needs] = Needs(gathers=BOTH)

    kind: Literal["uniformity"]
    """Log of the mean Gaussian potential of rows of different ids; mean of both modalities."""
    t: PositiveFloat = 2.0
    """Sharpness of the potential."""


class RegressionTerm(Term):
    """Mean squared error between the heads' outputs of a pair."""

    kind: Literal["regression"]
    """VICReg's invariance alone."""


class DiversityTerm(Term):
    """Penalty on dimensions that hardly vary."""

    kind: Literal["diversity"]
    """Weighs up to twice as much the more dimensions are low."""
    floor: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Least deviation of a unit row's dimension, as a share of the isotropic 1 / sqrt(width)."""


class DistillationTerm(Term):
    """InfoNCE towards what the momentum encoders find similar (ALBEF)."""

    needs: ClassVar[Needs] = Needs(queue=True, momentum=True)

    kind: Literal["distillation"]
    """Contrasts with the momentum encoders' rows and the queue."""
    alpha: Share = Ramp.constant(0.4)
    """Share of the momentum encoders' opinion in the target; a number or a ramp."""

    def contrasts_in(self, mined: bool) -> Literal["strips"]:
        """Of the batch with the momentum rows and the queue."""
        return "strips"


class MatchingTerm(Term):
    """Cross-entropy of the fusion model's match or no match."""

    needs: ClassVar[Needs] = Needs(fusion="matching")

    kind: Literal["matching"]
    """Needs `model.fusion`."""


class ClassificationTerm(Term):
    """Cross-entropy of class labels."""

    needs: ClassVar[Needs] = Needs(fusion="classes", labels=True)

    kind: Literal["classification"]
    """Needs labels in the data; rows without one are left out."""


OneWidth: TypeAlias = (
    InfoNCETerm | SigLIPTerm | DCLTerm | NTXentTerm | SupConTerm | HingeTerm | HardNegativeTerm
)


class MatryoshkaTerm(Term):
    """A contrastive term at the first dimensions of the embeddings, for each of several widths."""

    needs: ClassVar[Needs] = Needs(gathers=BOTH, queue=True, mining=True)

    kind: Literal["matryoshka"]
    """Recall is told at each width too; the whole width is the objective's other terms'."""
    widths: Annotated[tuple[Positive, ...], Field(min_length=1)]
    """Numbers of dimensions, ascending, each below `model.embed_dim`."""
    weights: tuple[PositiveFloat, ...] | None = None
    """Factor of each width; null: 1."""
    of: Annotated[OneWidth, Field(discriminator="kind")] = InfoNCETerm(kind="infonce")
    """The term, with its options; its weight is this one's."""

    def contrasts_in(self, mined: bool) -> Literal["tiles", "strips"] | None:
        return self.of.contrasts_in(mined)

    @model_validator(mode="after")
    def _check(self) -> "MatryoshkaTerm":
        if list(self.widths) != sorted(set(self.widths)):
            raise ValueError(
                f"given widths that ascend, not {list(self.widths)}; put them in order"
            )
        if len(self.weights or self.widths) != len(self.widths):
            raise ValueError("given as many weights as widths, or none; give one for each width")
        if self.of.weight != ONE:
            raise ValueError("given its weight beside its kind; take the weight out of its of")
        return self


AnyTerm: TypeAlias = (
    InfoNCETerm
    | SigLIPTerm
    | DCLTerm
    | NTXentTerm
    | SupConTerm
    | HingeTerm
    | HardNegativeTerm
    | SpectralTerm
    | PrototypesTerm
    | VICRegTerm
    | BarlowTerm
    | DecorrelationTerm
    | AlignmentTerm
    | UniformityTerm
    | RegressionTerm
    | DiversityTerm
    | DistillationTerm
    | TeacherTerm
    | AnchorTerm
    | L2StartTerm
    | MatchingTerm
    | ClassificationTerm
    | MatryoshkaTerm
)
# Every term there is, by its `kind`.
TERMS: dict[str, type[Term]] = {
    get_args(term.model_fields["kind"].annotation)[0]: term for term in get_args(AnyTerm)
}

Precision: TypeAlias = Literal["fp32", "tf32", "bf16"]
_FIRST_EPOCH = "1 epochs"
OBJECTIVES: dict[str, tuple[dict[str, Any], ...]] = {
    "clip": ({"kind": "infonce"},),
    "siglip": ({"kind": "siglip"},),
    "vicreg_clip": ({"kind": "infonce"}, {"kind": "vicreg", "weight": 0.04}),
    "albef": (
        {"kind": "distillation", "alpha": {"from": 0, "to": 0.4, "over": _FIRST_EPOCH}},
        {"kind": "matching"},
    ),
    "simple": (
        {"kind": "infonce"},
        {"kind": "regression", "weight": 0.5},
        {"kind": "decorrelation", "weight": 0.2},
    ),
    "mixed": (
        {"kind": "infonce"},
        {"kind": "decorrelation", "weight": 0.2},
        {
            "kind": "hinge",
            "weight": 0.5,
            "hardness": {"from": 0, "to": 1, "over": _FIRST_EPOCH},
        },
        {"kind": "diversity", "weight": 0.1},
        {"kind": "matching", "weight": 0.5},
        {"kind": "classification", "weight": 0.5},
    ),
}


class LossConfig(Section):
    """The objective: a weighted sum of terms."""

    preset: Literal["clip", "siglip", "vicreg_clip", "albef", "simple", "mixed"] | None = None
    """A named list of terms (docs/losses.md); fills `terms`."""
    terms: tuple[Annotated[AnyTerm, Field(discriminator="kind")], ...] = (
        InfoNCETerm(kind="infonce"),
    )
    """Weighted terms whose sum is minimised; default InfoNCE alone."""
    precision: Precision = "fp32"
    """What rows and columns are rounded to in their products; sums and statistics stay fp32."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, settings: Any) -> Any:
        if isinstance(settings, dict) and "terms" not in settings:
            named = OBJECTIVES.get(str(settings.get("preset")))
            return settings if named is None else {**settings, "terms": named}
        return settings

    @model_validator(mode="after")
    def _check(self) -> "LossConfig":
        if not self.terms:
            raise ValueError("given at least one term in loss.terms")
        named: Any = OBJECTIVES.get(str(self.preset))
        if named is not None and self.terms != LossConfig(terms=named).terms:
            raise ValueError(
                f"either loss.preset={self.preset} or other loss.terms, not both; remove one"
            )
        return self
