"""Rules about which rows are near: twins among negatives, hubs."""

import math

from mmscale.diagnostics.finding import Figures, Finding, below, decided, picked
from mmscale.diagnostics.rules_pairing import unaligned_surely

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
