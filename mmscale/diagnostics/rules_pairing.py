"""Rules about whether images and captions belong together row by row, and what else they do."""

import math

from mmscale.diagnostics.finding import Figures, Finding, below, decided, picked
from mmscale.diagnostics.order import SURE
from mmscale.diagnostics.pairing import LARGEST_SAMPLE, noise_of

# A weak model under training is near 0.7 to 0.8, an untrained one within sampling error of 0.5.
ALIGNED_AUC = 0.6
ALIGNED_Z = 4.0

# Random pairings pass 6 less than once in 400 even where features have a single direction.
PAIRED_Z = 6.0

# Below this CKA towers that carry something are strangers: between MobileNetV2 and MiniLM 0.24 to
# 0.26 was seen on photographs, 0.02 to 0.06 where one of the two is untrained.
UNRELATED_CKA = 0.025

# Untrained image towers vary in 2 to 8 directions (11 architectures, photographs), or hardly from
# row to row (MobileNetV2: a share of 0.02); pretrained ones in 81, and by 0.5.
FEWEST_DIMS = 10.0
LEAST_SPREAD = 0.1

# CKA of two captions of one image: 0.65 by MiniLM, 0.09 to 0.17 by untrained text towers, in which
# the same words still are the same rows; captions of other images are at 0.
AGREEING_CAPTIONS = 0.3
STRANGE_CAPTIONS = 0.03
FEWEST_DIMS_OF_WORDS = 4.0

_TURNS = f"auc_centred above {ALIGNED_AUC:g} and delta_z above {ALIGNED_Z:g}"

# How surely some pairs are matched, and how surely more than a few others are not, for a mixture:
# of spaces without mispaired pairs, among them ones in which a pair's noise is log-normal, none was
# seen above 2.8, and none above 2 where the share comes out at a half or less: there less is asked.
MATCHED_Z = 5.0
MISPAIRED_Z = 3.5
MOSTLY_MISPAIRED_Z = 2.5
_FEW, _MANY = 0.8, 0.5

# Whether images find captions in other rows: towers that never met were not seen above 3.5.
ELSEWHERE_Z = 5.0

SHARES = ("matched_share", "matched_share_low", "matched_share_high")

# What the space itself shows of pairs that do not belong together.
ORDER_EVIDENCE = ("shift_z", "reversed_z", "elsewhere_z", "mispaired_z")

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


def pairs_in_doubt(figures: Figures) -> bool:
    """Whether it is worth looking for captions in other rows."""
    if "auc_centred" not in figures:
        return False
    return unaligned_surely(figures) > 0.5 or mixed_surely(figures) > 0.5


def shuffled_pairs(figures: Figures) -> Finding:
    """Some pairs belong together and others do not, or captions stand in other rows.

    Or matched pairs do not stand out, and the towers' own features do not know each other either;
    or those of training pairs do not, while held-out ones do. Where none of that shows, the verdict
    is `unaligned`.
    """
    found = [
        (*_moved(figures), ("shift", "shift_share", "shift_block", "shift_z")),
        (*_reversed(figures), ("reversed_shift", "reversed_share", "reversed_z")),
        (*_elsewhere(figures), ("elsewhere_z",)),
        (*_mixed(figures), (*SHARES, "mispaired_z")),
        (*_strangers(figures), ("backbone_cka", "backbone_cka_z", "train_backbone_cka_z")),
        (*_strange_captions(figures), ("captions_cka", "captions_cka_z")),
    ]
    sure = max(chance for chance, *_ in found)
    told = [entry for entry in found if entry[0] > 0.5] or found
    names = [name for *_, names in told for name in names]
    causes = (*(cause for _, cause, _ in told if cause), *SHUFFLED_CAUSES)
    evidence = picked(figures, *names, "auc_centred", "delta_z")
    remedies = ("data.feature_cache=null", "data.workers=0")
    turns = (
        _TURNS if unaligned_surely(figures) > 0.5 else f"mispaired_z below {MOSTLY_MISPAIRED_Z:g}"
    )
    return decided(sure, evidence, causes, remedies, turns)


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
    causes = _unaligned_causes(figures)
    return decided(unaligned_surely(figures), evidence, causes, remedies, _TURNS)


def unaligned_surely(figures: Figures) -> float:
    """How sure it is that pairing shows too little: a small effect, or one chance explains."""
    area, num = figures["auc_centred"], figures["pairs"]
    # Hanley and McNeil 1982 with `num` matched cells and unmatched ones without end.
    error = math.sqrt(max(2 * area**2 / (1 + area) - area**2, 0.0) / num)
    return max(below(area, ALIGNED_AUC, error), below(figures["delta_z"], ALIGNED_Z, 1.0))


def mixed_surely(figures: Figures) -> float:
    """How sure it is that some pairs belong together and more than a few do not."""
    if "mispaired_z" not in figures:
        return 0.0
    part = min(1.0, max(0.0, (figures["matched_share"] - _MANY) / (_FEW - _MANY)))
    asked = MOSTLY_MISPAIRED_Z + part * (MISPAIRED_Z - MOSTLY_MISPAIRED_Z)
    return min(
        1 - below(figures["matched_z"], MATCHED_Z, 1.0),
        1 - below(figures["mispaired_z"], asked, 1.0),
    )


def _mixed(figures: Figures) -> tuple[float, str]:
    """Some pairs are as similar as matched ones, others as those that do not belong together."""
    sure = mixed_surely(figures)
    if sure <= 0.5:
        return sure, ""
    share, low, high = (figures[name] for name in SHARES)
    return sure, (
        f"Only {share:.0%} of the pairs belong together ({low:.0%} to {high:.0%}); the captions of "
        "the others fit their images no better than any other caption: they are wrong, or the "
        "model does not know what they show, as with another language or another kind of picture"
    )


def _moved(figures: Figures) -> tuple[float, str]:
    """Captions stand a number of rows below or above their images."""
    if "shift" not in figures:
        return 0.0, ""
    shift, block = int(figures["shift"]), int(figures["shift_block"])
    where = f"row i {'+' if shift > 0 else '-'} {abs(shift)}"
    within = f" within blocks of {block} rows" if block else ""
    return _in_order(figures, "shift_z"), (
        f"Captions are shifted{within}: row i of the images fits {where} of the captions, in "
        f"{figures['shift_share']:.0%} of the rows; take the captions back by {abs(shift)}, or "
        "look for a row that one side has and the other lacks"
    )


def _reversed(figures: Figures) -> tuple[float, str]:
    """The last caption belongs to the first image."""
    if "reversed_shift" not in figures:
        return 0.0, ""
    shift = int(figures["reversed_shift"])
    beside = f", shifted by {shift}" if shift else ""
    return _in_order(figures, "reversed_z"), (
        f"Captions are reversed{beside}: the first image fits the last caption, the second the one "
        f"before it, in {figures['reversed_share']:.0%} of the rows"
    )


def _elsewhere(figures: Figures) -> tuple[float, str]:
    """Images find captions that fit, in rows without an order that can be named."""
    named = max(_moved(figures)[0], _reversed(figures)[0], mixed_surely(figures))
    if "elsewhere_z" not in figures or named > 0.5:
        return 0.0, ""
    sure = 1 - below(figures["elsewhere_z"], ELSEWHERE_Z, 1.0)
    return min(sure, unaligned_surely(figures)), (
        "Captions stand in other rows, a permutation: the towers have learnt one space, in which "
        "images find captions that fit, but not in their own rows"
    )


def _in_order(figures: Figures, name: str) -> float:
    """An order is told where the rows' own is not right already."""
    doubt = max(unaligned_surely(figures), mixed_surely(figures))
    return min(1 - below(figures[name], SURE, 1.0), doubt)


def _strangers(figures: Figures) -> tuple[float, str]:
    """The towers' own features do not resemble each other pair by pair, though each has some."""
    if "backbone_cka_z" not in figures:
        return 0.0, ""
    held_out_z, train_z = figures["backbone_cka_z"], figures.get("train_backbone_cka_z")
    here = 0.0 if _empty_tower(figures) else below(held_out_z, _related_z(figures), 1.0)
    there = 0.0
    if train_z is not None and held_out_z > PAIRED_Z:
        there = min(1 - here, below(train_z, PAIRED_Z, 1.0))
    cause = IN_TRAINING_CAUSE if there > here else ""
    return min(unaligned_surely(figures), max(here, there)), cause


def _strange_captions(figures: Figures) -> tuple[float, str]:
    """Captions that are said to be of one image are no more alike than others."""
    if (
        "captions_cka_z" not in figures
        or figures.get("backbone_dims_text", 0.0) < FEWEST_DIMS_OF_WORDS
    ):
        return 0.0, ""
    most = STRANGE_CAPTIONS / _noise(figures)
    sure = below(figures["captions_cka_z"], min(ALIGNED_Z, most), 1.0)
    return min(sure, unaligned_surely(figures)), (
        "Captions that are given to one image do not resemble each other, not even in their words: "
        "each was joined to a wrong image by itself"
    )


def _related_z(figures: Figures) -> float:
    """The z that pairs of towers which know something of each other pass, on so many pairs."""
    return min(PAIRED_Z, UNRELATED_CKA / _noise(figures))


def _noise(figures: Figures) -> float:
    return noise_of(max(4.0, min(figures["pairs"], LARGEST_SAMPLE)))


def _empty_tower(figures: Figures) -> str:
    """The tower whose own features carry so little that they could not show any pairs."""
    agree = figures.get("captions_cka")
    if agree is not None and agree < AGREEING_CAPTIONS:
        return "text"
    for side in ("image", "text"):
        dims = figures.get(f"backbone_dims_{side}", FEWEST_DIMS)
        spread = figures.get(f"backbone_spread_{side}", LEAST_SPREAD)
        if dims < FEWEST_DIMS or spread < LEAST_SPREAD:
            return side
    return ""


def _unaligned_causes(figures: Figures) -> tuple[str, ...]:
    untrained = (
        "The heads or towers are not updated: parameters missing from the optimizer, frozen, or "
        "gradients that are zero",
        "What is evaluated is not what was trained: heads bypassed, or weights not loaded",
    )
    if max(_moved(figures)[0], _reversed(figures)[0], _elsewhere(figures)[0]) > 0.5:
        return (
            "The towers have learnt one space, in which captions stand in other rows: see "
            "shuffled_pairs",
        )
    if "backbone_cka_z" not in figures:
        unknown = (
            "No order of the rows fits better, as if the towers never met; a space too weak to "
            "show an order looks the same, and without backbone features its shuffled pairs and "
            "unaligned towers cannot be told apart: add backbone_image and backbone_text "
            "(mmscale embed writes them)"
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
    if empty := _empty_tower(figures):
        return (
            f"The {empty} tower's own features hardly tell one input from another, as those of an "
            "untrained tower: they cannot show whether the pairs are right",
            f"The {empty} tower was never trained, or its weights were not loaded",
            *untrained,
            *SHUFFLED_CAUSES,
        )
    if figures["backbone_cka_z"] > _related_z(figures):
        return (
            f"On {figures['pairs']:.0f} pairs the towers' features resemble each other too little "
            "to be sure of the pairs, and too much to call them shuffled: embed some hundreds more",
            *untrained,
            *SHUFFLED_CAUSES,
        )
    return (
        "The towers' features do not resemble each other pair by pair: if the towers are "
        "pretrained, the pairs are shuffled",
        *SHUFFLED_CAUSES,
        *untrained,
    )
