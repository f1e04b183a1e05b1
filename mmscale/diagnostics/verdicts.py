"""The doctor's rules: one function a verdict, each reading the figures and nothing else.

A rule says whether its verdict holds, how sure that is, on which figures, what to check and what to
set. Adding one: write the function here and enter it in `RULES`; its place follows from `ORDER`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Figures = Mapping[str, float]

ORDER = (
    "too_few_samples",
    "complete_collapse",
    "dead_tower",
    "dimensional_collapse",
    "shuffled_pairs",
    "unaligned",
    "scale_saturated",
    "scale_stuck_low",
    "overfit",
    "false_negatives",
    "hubness",
    "healthy",
)
"""Every verdict's name; the first that holds is given."""

# At 32 pairs chance leaves the AUC a deviation of 0.05 and a good model is 20 deviations from
# chance (CLIP on COCO: 79 at 500 pairs, falling with the root); below, neither side is clear.
FEWEST_IMAGES = 32

# Mean cosine within a tower above 0.95. Collapsed runs end above 0.97; healthy ones were seen to
# contract to 0.91 for some steps and recover.
COLLAPSED_VARIANCE = 0.05

# A tower this narrow is failing whatever information is left in it.
VANISHED_VARIANCE = 0.01

# A weak model under training is near 0.7 to 0.8, an untrained one within sampling error of 0.5.
ALIGNED_AUC = 0.6
ALIGNED_Z = 4.0

# Random pairings pass 6 less than once in 400 even where features have a single direction.
PAIRED_Z = 6.0


@dataclass(frozen=True)
class Finding:
    """One rule's answer.

    Attributes:
        holds: Whether the verdict applies.
        confidence: Share of other samples of this size on which the answer would be the same, by a
            normal approximation of the figures' sampling error; 0.5 is on the threshold.
        evidence: The figures that decided it.
        causes: What may be behind it, in the order to check.
        remedies: Settings to try, `key=value`.
    """

    holds: bool
    confidence: float
    evidence: dict[str, float]
    causes: tuple[str, ...] = ()
    remedies: tuple[str, ...] = ()


def too_few_samples(figures: Figures) -> Finding:
    """There are not enough distinct images to tell signal from chance."""
    num = figures["pairs"]
    causes = (
        f"The pairs hold {num:.0f} distinct images with a caption, {FEWEST_IMAGES} are needed; "
        "embed more",
        "Equal image ids count once: check that the ids are not constant",
    )
    return Finding(num < FEWEST_IMAGES, 1.0, {"pairs": num}, causes)


def complete_collapse(figures: Figures) -> Finding:
    """Both towers give nearly one vector each."""
    widest = max(figures["variance_image"], figures["variance_text"])
    sure = _below(widest, COLLAPSED_VARIANCE, _variance_error(widest, figures["pairs"]))
    causes = (
        "The learning rate is too high, or warm-up too short",
        "Training pairs are mixed up, and the loss has settled at ln(batch)",
        "The towers were never trained, and their outputs share one large common part",
    )
    remedies = (
        "optim.lr=1e-4",
        "optim.warmup=1000 steps",
        "optim.clip_norm=1.0",
        "model.head.standardize=4096",
    )
    evidence = _picked(figures, "variance_image", "variance_text", "std_off_sqrt_d")
    return _decided(sure, evidence, causes, remedies)


def dead_tower(figures: Figures) -> Finding:
    """One tower gives nearly one vector, the other does not."""
    variances = {side: figures[f"variance_{side}"] for side in ("image", "text")}
    dead = min(variances, key=variances.__getitem__)
    narrow, wide = variances[dead], max(variances.values())
    num = figures["pairs"]
    narrowed = _below(narrow, COLLAPSED_VARIANCE, _variance_error(narrow, num))
    vanished = _below(narrow, VANISHED_VARIANCE, _variance_error(narrow, num))
    alone = 1 - _below(wide, COLLAPSED_VARIANCE, _variance_error(wide, num))
    # A narrow cone that still tells its inputs apart is not dead.
    sure = min(alone, max(vanished, min(narrowed, _unaligned(figures))))
    component = {"image": "vision", "text": "text"}[dead]
    other = {"image": "text", "text": "image"}[dead]
    inputs = {"image": "pixels", "text": "tokens"}[dead]
    causes = (
        f"The {dead} tower gives the same embedding whatever it is shown: look at its {inputs}, "
        "their normalisation, padding and mask",
        f"The {dead} tower's output is not finite in half precision and was set to zero",
        f"The {dead} tower or its head gets no gradient, or its rate killed it; "
        f"the {other} tower is alive",
    )
    remedies = (
        "engine.precision=fp32",
        f"model.{component}.weights=pretrained",
        f"optim.lr_scale.{component}=0.1",
        "optim.warmup=1000 steps",
    )
    share = {"image": "column_share", "text": "row_share"}[dead]
    evidence = _picked(figures, "variance_image", "variance_text", share)
    return _decided(sure, evidence, causes, remedies)


def unaligned(figures: Figures) -> Finding:
    """Matched pairs do not stand out of the others."""
    remedies = (
        "optim.lr_scale.head=1.0",
        "negatives.gather=true",
        "model.head.standardize=4096",
        "optim.warmup=1000 steps",
        "engine.precision=fp32",
    )
    evidence = _picked(figures, "auc_centred", "delta_z", "cka_z", "backbone_cka_z")
    return _decided(_unaligned(figures), evidence, _unaligned_causes(figures), remedies)


RULES: dict[str, Callable[[Figures], Finding]] = {
    "too_few_samples": too_few_samples,
    "complete_collapse": complete_collapse,
    "dead_tower": dead_tower,
    "unaligned": unaligned,
}


def _unaligned_causes(figures: Figures) -> tuple[str, ...]:
    untrained = (
        "The heads or towers are not updated: parameters missing from the optimizer, frozen, or "
        "gradients that are zero",
        "What is evaluated is not what was trained: heads bypassed, or weights not loaded",
    )
    shuffled = (
        "Rows of images and captions are out of order: gathering, shuffling or a join on file "
        "names; compare keys",
    )
    if "backbone_cka_z" not in figures:
        unknown = (
            "Without backbone features shuffled pairs and unaligned towers cannot be told apart; "
            "add backbone_image and backbone_text (mmscale embed writes them)"
        )
        if figures["cka_z"] > PAIRED_Z:
            hint = "The towers' outputs resemble each other pair by pair: this speaks for unaligned"
            return (unknown, hint, *untrained, *shuffled)
        return (unknown, *untrained, *shuffled)
    if figures["backbone_cka_z"] > PAIRED_Z:
        return (
            "The towers' features resemble each other pair by pair: the pairs are right, "
            "the shared space is not learnt",
            *untrained,
        )
    return (
        "The towers' features do not resemble each other pair by pair: if the towers are "
        "pretrained, the pairs are shuffled",
        *shuffled,
        *untrained,
    )


def _unaligned(figures: Figures) -> float:
    """How sure it is that pairing shows too little: a small effect, or one chance explains."""
    area, num = figures["auc_centred"], figures["pairs"]
    # Hanley and McNeil 1982 with `num` matched cells and unmatched ones without end.
    error = math.sqrt(max(2 * area**2 / (1 + area) - area**2, 0.0) / num)
    return max(_below(area, ALIGNED_AUC, error), _below(figures["delta_z"], ALIGNED_Z, 1.0))


def _variance_error(variance: float, num: float) -> float:
    """Largest sampling error of 1 - |mean|^2 that rows of this variance allow."""
    return 2 * math.sqrt(max(variance, 0.0) / num)


def _below(value: float, threshold: float, error: float) -> float:
    """Chance that another sample's value is below the threshold; over 0.5 if this one's is."""
    if error == 0.0:
        return 1.0 if value < threshold else 0.0
    return 0.5 * (1 + math.erf((threshold - value) / error / math.sqrt(2)))


def _picked(figures: Figures, *names: str) -> dict[str, float]:
    return {name: figures[name] for name in names if name in figures}


def _decided(
    sure: float, evidence: dict[str, float], causes: tuple[str, ...], remedies: tuple[str, ...]
) -> Finding:
    holds = sure > 0.5
    return Finding(holds, sure if holds else 1 - sure, evidence, causes, remedies)
