"""The doctor's verdicts in their order and the rule of each, but those about the pairing."""

import math
from collections.abc import Callable

from mmscale.diagnostics.finding import Figures, Finding, below, decided, picked
from mmscale.diagnostics.rules_pairing import shuffled_pairs, unaligned, unaligned_surely

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
    turns = f"{FEWEST_IMAGES} distinct images with a caption"
    return Finding(num < FEWEST_IMAGES, 1.0, {"pairs": num}, causes, turns=turns)


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
    turns = f"variance_image or variance_text above {COLLAPSED_VARIANCE:g}"
    return decided(sure, evidence, causes, remedies, turns)


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
    turns = f"variance_{dead} above {COLLAPSED_VARIANCE:g}, or pairs that stand out in it"
    return decided(sure, evidence, causes, remedies, turns)


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
    turns = f"knee_{side} below {_largest_knee(figures, side):.0f} on so many pairs"
    return decided(narrow[side], evidence, causes, remedies, turns)


def _narrowness(figures: Figures, side: str) -> float:
    """How sure it is that a tower's directions are too few; never where it has no spread at all."""
    # Rows that stand there several times leave directions empty without any fault of the model.
    if figures[f"participation_{side}"] == 0.0 or figures[f"twins_{side}"] > MANY_TWINS:
        return 0.0
    largest = _largest_knee(figures, side)
    # Eigenvalues repeat within a fifth or so from sample to sample.
    breaks = 1 - below(math.log(figures[f"knee_{side}"]), math.log(largest), 0.2)
    return max(breaks, below(figures[f"participation_{side}"], FEWEST_DIRECTIONS, 0.1))


def _largest_knee(figures: Figures, side: str) -> float:
    inflated = (1 + math.sqrt(figures[f"dims_possible_{side}"] / figures["pairs"])) ** 2
    return max(LARGEST_KNEE / inflated, LARGEST_KNEE_OF_FEW)


def _variance_error(variance: float, num: float) -> float:
    """Largest sampling error of 1 - |mean|^2 that rows of this variance allow."""
    return 2 * math.sqrt(max(variance, 0.0) / num)


# Share of images, and of captions, that are there twice under another id.
MOST_TWINS = {"image": 0.05, "text": 0.3}

# Skew of how often an item is chosen, share of items never chosen, and share of the similarity's
# variance that the item alone decides. CLIP on COCO has 2.4, 0.37, 0.17; a narrow cone in which a
# common part takes half of a row's length 5.9, 0.8, 0.4; a space of hubs over 5, 0.5 and 0.9.
MOST_SKEW = 2.0
MOST_UNCOVERED = 0.5
MOST_SHARE = 0.6

# Captions are the columns, which images choose from.
_SHARES = {"i2t": "column_share", "t2i": "row_share"}


def false_negatives(figures: Figures) -> Finding:
    """Rows are there several times under other ids, so that a match counts as a negative."""
    shares = {side: figures[f"twins_{side}"] for side in MOST_TWINS}
    num = figures["pairs"]
    sure = {
        side: 1 - below(shares[side], most, math.sqrt(most * (1 - most) / num))
        for side, most in MOST_TWINS.items()
    }
    causes = (
        "An image stands under several ids, once for each of its captions: give its rows one "
        "image id",
        "The data holds copies of images or captions: group them, so that they are positives",
        "The captions are labels that many images share",
    )
    remedies = (
        "data.match=caption",
        "data.captions=random",
        "loss.preset=clip",
    )
    evidence = picked(figures, "twins_image", "twins_text")
    turns = " and ".join(f"twins_{side} below {most:g}" for side, most in MOST_TWINS.items())
    return decided(max(sure.values()), evidence, causes, remedies, turns)


def hubness(figures: Figures) -> Finding:
    """A few items are the nearest of very many, and most are nobody's."""
    sides = {side: _hubs(figures, side) for side in ("i2t", "t2i")}
    side = max(sides, key=sides.__getitem__)
    causes = (
        "The rows share a large common part, so that items near it are near everything",
        "Few negatives a batch: popular items are never pushed away",
        "The space is narrow for the number of items",
    )
    remedies = (
        "train.global_batch_size=1024",
        "model.head.standardize=4096",
        "negatives.queue.size=4096",
        "model.embed_dim=512",
    )
    evidence = picked(figures, f"hub_skew_{side}", f"uncovered_{side}", _SHARES[side])
    # Where nothing is matched, and where a tower is constant, the nearest item is chance.
    sure = min(sides[side], 1 - unaligned_surely(figures))
    turns = (
        f"hub_skew_{side} below {MOST_SKEW:g}, uncovered_{side} below {MOST_UNCOVERED:g} or "
        f"{_SHARES[side]} below {MOST_SHARE:g}"
    )
    return decided(sure, evidence, causes, remedies, turns)


def _hubs(figures: Figures, side: str) -> float:
    error = 0.5 / math.sqrt(figures["pairs"])
    return min(
        1 - below(figures[f"hub_skew_{side}"], MOST_SKEW, 0.5),
        1 - below(figures[f"uncovered_{side}"], MOST_UNCOVERED, error),
        1 - below(figures[_SHARES[side]], MOST_SHARE, error),
    )


# Where the scale is clamped by default; at 100 a trained CLIP is healthy and far from its floor.
CLAMP = 100.0
# Share of the way from chance to the floor at which nothing is left to learn from a batch.
DONE = 0.99
# Share of the chance loss that the scale itself forbids to go below.
LEAST_FLOOR = 0.5
# Loss progress on training rows, and how far held-out rows of the same number may lag behind it.
LEARNT = 0.9
LARGEST_GAP = 0.4


def scale_saturated(figures: Figures) -> Finding:
    """The scale is at its limit and the loss at its floor: gradients vanish."""
    if "logit_scale" not in figures:
        return Finding(False, 1.0, {})
    beyond = 1 - below(figures["logit_scale"], 1.05 * CLAMP, 0.01 * CLAMP)
    at_limit = 1 - below(figures["logit_scale"], 0.99 * CLAMP, 0.005 * CLAMP)
    done = 1 - below(figures["loss_progress"], DONE, 0.002)
    causes = (
        "The scale rose to its clamp while the batch is already told apart: the negatives are too "
        "easy or too few",
        "The scale learns faster than the towers, or started too high",
        "The limit of the scale was raised",
    )
    remedies = (
        "optim.lr_scale.scale=0.1",
        "model.logit_scale.max=50",
        "model.logit_scale.init=14.2857",
        "train.global_batch_size=1024",
        "negatives.queue.size=4096",
    )
    evidence = picked(figures, "logit_scale", "loss", "loss_progress")
    turns = f"logit_scale below {0.99 * CLAMP:g}, or loss_progress below {DONE:g} at the limit"
    return decided(max(beyond, min(at_limit, done)), evidence, causes, remedies, turns)


def scale_stuck_low(figures: Figures) -> Finding:
    """Pairs are aligned, but the scale keeps the loss near chance whatever the towers learn."""
    if "logit_scale" not in figures:
        return Finding(False, 1.0, {})
    share = figures["loss_floor"] / figures["loss_chance"]
    low = 1 - below(share, LEAST_FLOOR, 0.02)
    causes = (
        "The logit scale is not trained: missing from the optimizer, or its rate is zero",
        "Weight decay pulls it down",
        "It started low and the run was too short to raise it",
    )
    remedies = (
        "model.logit_scale.init=14.2857",
        "optim.lr_scale.scale=1.0",
    )
    evidence = picked(figures, "logit_scale", "loss", "loss_floor", "loss_chance")
    sure = min(low, 1 - unaligned_surely(figures))
    turns = f"loss_floor below {LEAST_FLOOR:g} of loss_chance"
    return decided(sure, evidence, causes, remedies, turns)


def overfit(figures: Figures) -> Finding:
    """Batches of training rows are told apart, held-out rows are not.

    Needs the run's own training figures (`train_loss_progress`); loss progress counts as many rows
    on both sides.
    """
    if "train_loss_progress" not in figures or "heldout_loss_progress" not in figures:
        return Finding(False, 1.0, {})
    gap = figures["train_loss_progress"] - figures["heldout_loss_progress"]
    learnt = 1 - below(figures["train_loss_progress"], LEARNT, 0.02)
    causes = (
        "The model knows its training pairs by heart: too many trained parameters for the pairs, "
        "or too many epochs",
        "Training and held-out pairs come from different sources",
        "The captions of the training file are joined to the wrong images, and were memorised",
    )
    remedies = (
        "train.duration=5 epochs",
        "model.vision.frozen=true",
        "data.augment=crop",
        "data.captions=random",
        "optim.weight_decay=0.2",
    )
    evidence = picked(figures, "train_loss_progress", "heldout_loss_progress", "train_auc", "auc")
    sure = min(learnt, 1 - below(gap, LARGEST_GAP, 0.05))
    turns = f"heldout_loss_progress less than {LARGEST_GAP:g} below train_loss_progress"
    return decided(sure, evidence, causes, remedies, turns)


def forgetting(figures: Figures) -> Finding:
    """A set that the run is to retain has lost more points than it may.

    Needs the run's own comparison with its start (`points_lost`).
    """
    if "points_lost" not in figures:
        return Finding(False, 1.0, {})
    lost, allowed = figures["points_lost"], figures["points_allowed"]
    causes = (
        "The weights have left what they were pretrained to: too high a rate, or too many updates",
        "Everything is trained, where a few blocks or an adapter would do",
    )
    remedies = (
        "optim.lr_scale.vision=0.1",
        "model.vision.adapter.kind=lora",
        "retain.budget=2.0",
    )
    evidence = picked(figures, "points_lost", "points_allowed", "points_error")
    sure = 1 - below(lost, allowed, figures["points_error"])
    return decided(sure, evidence, causes, remedies, f"points_lost below {allowed:g}")


RULES: dict[str, Callable[[Figures], Finding]] = {
    "too_few_samples": too_few_samples,
    "complete_collapse": complete_collapse,
    "dead_tower": dead_tower,
    "dimensional_collapse": dimensional_collapse,
    "shuffled_pairs": shuffled_pairs,
    "unaligned": unaligned,
    "scale_saturated": scale_saturated,
    "scale_stuck_low": scale_stuck_low,
    "overfit": overfit,
    "forgetting": forgetting,
    "false_negatives": false_negatives,
    "hubness": hubness,
}
"""The first that holds is the verdict; none: `healthy`."""

ORDER = (*RULES, "healthy")
