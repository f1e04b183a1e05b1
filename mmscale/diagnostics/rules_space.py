"""Rules about the shape of each tower's rows: too few, one point, one dead, too few directions."""

import math

from mmscale.diagnostics.finding import Figures, Finding, below, decided, picked
from mmscale.diagnostics.rules_pairing import unaligned_surely

# At 32 pairs chance leaves the AUC a deviation of 0.05 and a good model is 20 deviations from
# chance (CLIP on COCO: 79 at 500 pairs, falling with the root); below, neither side is clear.
FEWEST_IMAGES = 32

# Mean cosine within a tower above 0.95. Collapsed runs end above 0.97; healthy ones were seen to
# contract to 0.91 for some steps and recover.
COLLAPSED_VARIANCE = 0.05

# A tower this narrow is failing whatever information is left in it.
VANISHED_VARIANCE = 0.01

# Share of a tower's own features' power that varies from row to row, above which they are alive:
# untrained towers are often below 0.01 without being dead, so it only says where to look.
LIVING_SPREAD = 0.01

BLIND_SPREAD = 1e-6

# A collapsed spectrum breaks off: rank 5 in little noise falls by some hundreds at once, CLIP's by
# 1.9 at most, that of a model of a world of few factors by 4 to 14 where the next factor is not
# learnt yet. Sampling makes noise's largest eigenvalue larger, and the step down to it smaller
# (Marchenko and Pastur 1967): many rows tell a break from a gap better than few.
LARGEST_KNEE = 40.0
LARGEST_KNEE_OF_FEW = 14.0

# Share of rows that are repeats, from which on the spectrum is that of fewer rows.
MANY_TWINS = 0.3

# Hardly more than one direction.
FEWEST_DIRECTIONS = 1.5


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
    sure = below(widest, COLLAPSED_VARIANCE, _variance_error(widest, figures["pairs"]))
    causes = (
        *_blind(figures),
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
    evidence = picked(figures, "variance_image", "variance_text", "std_off_sqrt_d")
    return decided(sure, evidence, causes, remedies)


def _blind(figures: Figures) -> tuple[str, ...]:
    """A tower whose own features are one vector draws the other's embeddings together too."""
    return tuple(
        f"The {side} tower's own features are the same whatever it is shown: look at its inputs"
        for side in ("image", "text")
        if figures.get(f"tower_spread_{side}", 1.0) < BLIND_SPREAD
    )


def dead_tower(figures: Figures) -> Finding:
    """One tower gives nearly one vector, the other does not."""
    variances = {side: figures[f"variance_{side}"] for side in ("image", "text")}
    dead = min(variances, key=variances.__getitem__)
    narrow, wide = variances[dead], max(variances.values())
    num = figures["pairs"]
    narrowed = below(narrow, COLLAPSED_VARIANCE, _variance_error(narrow, num))
    vanished = below(narrow, VANISHED_VARIANCE, _variance_error(narrow, num))
    alone = 1 - below(wide, COLLAPSED_VARIANCE, _variance_error(wide, num))
    # A narrow cone that still tells its inputs apart is not dead.
    sure = min(alone, max(vanished, min(narrowed, unaligned_surely(figures))))
    component = {"image": "vision", "text": "text"}[dead]
    other = {"image": "text", "text": "image"}[dead]
    inputs = {"image": "pixels", "text": "tokens"}[dead]
    causes = (
        *_where_it_died(figures, dead, inputs),
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
    evidence = picked(figures, "variance_image", "variance_text", share, f"tower_spread_{dead}")
    return decided(sure, evidence, causes, remedies)


def _where_it_died(figures: Figures, dead: str, inputs: str) -> tuple[str, ...]:
    spread = figures.get(f"tower_spread_{dead}")
    if spread is not None and spread > LIVING_SPREAD:
        return (
            f"The {dead} tower's own features vary, the head after it makes one vector of them: "
            "look at the head's weights, its rate and what it normalises",
        )
    return (
        f"The {dead} tower gives the same embedding whatever it is shown: look at its {inputs}, "
        "their normalisation, padding and mask",
    )


def dimensional_collapse(figures: Figures) -> Finding:
    """A tower that is alive uses a few of the directions that it has."""
    narrow = {side: _narrowness(figures, side) for side in ("image", "text")}
    side = max(narrow, key=narrow.__getitem__)
    component = {"image": "vision", "text": "text"}[side]
    causes = (
        f"The {side} head or a layer before it has few directions: a narrow layer, or weights "
        "decayed or pulled to low rank",
        f"The {side} tower's own features lie in few directions: untrained weights, or a "
        "normalisation that is not the tower's",
        "The captions or crops leave little to tell apart, so that few directions are needed",
    )
    remedies = (
        "loss.preset=vicreg_clip",
        "model.head.kind=linear",
        f"model.{component}.weights=pretrained",
        "optim.weight_decay=0.01",
        "train.global_batch_size=1024",
    )
    names = ("knee", "knee_at", "dims_possible", "participation")
    evidence = picked(figures, *(f"{name}_{side}" for name in names))
    return decided(narrow[side], evidence, causes, remedies)


def _narrowness(figures: Figures, side: str) -> float:
    """How sure it is that a tower's directions are too few; never where it has no spread at all."""
    # Rows that stand there several times leave directions empty without any fault of the model.
    if figures[f"participation_{side}"] == 0.0 or figures[f"twins_{side}"] > MANY_TWINS:
        return 0.0
    inflated = (1 + math.sqrt(figures[f"dims_possible_{side}"] / figures["pairs"])) ** 2
    largest = max(LARGEST_KNEE / inflated, LARGEST_KNEE_OF_FEW)
    # Eigenvalues repeat within a fifth or so from sample to sample.
    breaks = 1 - below(math.log(figures[f"knee_{side}"]), math.log(largest), 0.2)
    return max(breaks, below(figures[f"participation_{side}"], FEWEST_DIRECTIONS, 0.1))


def _variance_error(variance: float, num: float) -> float:
    """Largest sampling error of 1 - |mean|^2 that rows of this variance allow."""
    return 2 * math.sqrt(max(variance, 0.0) / num)
