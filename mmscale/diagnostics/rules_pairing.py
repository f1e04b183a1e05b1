"""Rules about which rows are near: pairs that do not match, twins among negatives, hubs."""

import math

from mmscale.diagnostics.finding import Figures, Finding, below, decided, picked

# A weak model under training is near 0.7 to 0.8, an untrained one within sampling error of 0.5.
ALIGNED_AUC = 0.6
ALIGNED_Z = 4.0

# Random pairings pass 6 less than once in 400 even where features have a single direction.
PAIRED_Z = 6.0

# Share of images, and of captions, that are there twice under another id.
MOST_TWINS = {"image": 0.05, "text": 0.3}

# Skew of how often an item is chosen, share of items never chosen, and share of the similarity's
# variance that the item alone decides. CLIP on COCO has 2.4, 0.37, 0.17; a narrow cone in which a
# common part takes half of a row's length 5.9, 0.8, 0.4; a space of hubs over 5, 0.5 and 0.9.
MOST_SKEW = 2.0
MOST_UNCOVERED = 0.5
MOST_SHARE = 0.6

SHUFFLED_CAUSES = (
    "Captions were joined to the wrong images when the data was packed: compare some with their "
    "images, and pack again",
    "Rows of images and captions are out of order: gathering, shuffling or a join on file "
    "names; compare keys",
)

IN_TRAINING_CAUSE = (
    "Only the training pairs are mixed up: held-out features resemble each other pair by pair, "
    "those of training batches do not; look at the training file, then at how batches are put "
    "together"
)

# Captions are the columns, which images choose from.
_SHARES = {"i2t": "column_share", "t2i": "row_share"}


def shuffled_pairs(figures: Figures) -> Finding:
    """Matched pairs do not stand out, and the towers' own features do not know each other either.

    Or those of training pairs do not, while held-out ones do. Needs features from before the heads;
    without them the verdict is `unaligned`.
    """
    if "backbone_cka_z" not in figures:
        return Finding(False, 1.0, {})
    here = below(figures["backbone_cka_z"], PAIRED_Z, 1.0)
    train_z = figures.get("train_backbone_cka_z")
    there = 0.0 if train_z is None else min(1 - here, below(train_z, PAIRED_Z, 1.0))
    sure = min(unaligned_surely(figures), max(here, there))
    causes = (IN_TRAINING_CAUSE, *SHUFFLED_CAUSES) if there > here else SHUFFLED_CAUSES
    remedies = ("data.feature_cache=null", "data.workers=0")
    evidence = picked(
        figures, "backbone_cka", "backbone_cka_z", "train_backbone_cka_z", "auc_centred", "delta_z"
    )
    return decided(sure, evidence, causes, remedies)


def unaligned(figures: Figures) -> Finding:
    """Matched pairs do not stand out of the others."""
    remedies = (
        "optim.lr_scale.head=1.0",
        "negatives.gather=true",
        "model.head.standardize=4096",
        "optim.warmup=1000 steps",
        "engine.precision=fp32",
    )
    evidence = picked(figures, "auc_centred", "delta_z", "cka_z", "backbone_cka_z")
    return decided(unaligned_surely(figures), evidence, _unaligned_causes(figures), remedies)


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
    return decided(max(sure.values()), evidence, causes, remedies)


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
    return decided(sure, evidence, causes, remedies)


def _hubs(figures: Figures, side: str) -> float:
    error = 0.5 / math.sqrt(figures["pairs"])
    return min(
        1 - below(figures[f"hub_skew_{side}"], MOST_SKEW, 0.5),
        1 - below(figures[f"uncovered_{side}"], MOST_UNCOVERED, error),
        1 - below(figures[_SHARES[side]], MOST_SHARE, error),
    )


def unaligned_surely(figures: Figures) -> float:
    """How sure it is that pairing shows too little: a small effect, or one chance explains."""
    area, num = figures["auc_centred"], figures["pairs"]
    # Hanley and McNeil 1982 with `num` matched cells and unmatched ones without end.
    error = math.sqrt(max(2 * area**2 / (1 + area) - area**2, 0.0) / num)
    return max(below(area, ALIGNED_AUC, error), below(figures["delta_z"], ALIGNED_Z, 1.0))


def _unaligned_causes(figures: Figures) -> tuple[str, ...]:
    untrained = (
        "The heads or towers are not updated: parameters missing from the optimizer, frozen, or "
        "gradients that are zero",
        "What is evaluated is not what was trained: heads bypassed, or weights not loaded",
    )
    if "backbone_cka_z" not in figures:
        unknown = (
            "Without backbone features shuffled pairs and unaligned towers cannot be told apart; "
            "add backbone_image and backbone_text (mmscale embed writes them)"
        )
        if figures["cka_z"] > PAIRED_Z:
            hint = "The towers' outputs resemble each other pair by pair: this speaks for unaligned"
            return (unknown, hint, *untrained, *SHUFFLED_CAUSES)
        return (unknown, *untrained, *SHUFFLED_CAUSES)
    if figures["backbone_cka_z"] > PAIRED_Z:
        return (
            "The towers' features resemble each other pair by pair: the pairs are right, "
            "the shared space is not learnt",
            *untrained,
        )
    return (
        "The towers' features do not resemble each other pair by pair: if the towers are "
        "pretrained, the pairs are shuffled",
        *SHUFFLED_CAUSES,
        *untrained,
    )
