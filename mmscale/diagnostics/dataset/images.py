"""Verdicts on the images of a set: useless ones, one picture twice, pictures of another set."""

from collections import Counter

from mmscale.data.caption_text import wording
from mmscale.diagnostics.dataset.copies import Pair, false_negative_rate, groups_of
from mmscale.diagnostics.dataset.verdict import (
    MOST_EXAMPLES,
    DataVerdict,
    Example,
    Looks,
    wilson,
)

# Photographs of people hold some that were taken at one moment: fewer than these.
TOLERATED_COPIES = 0.01
TOLERATED_LEAKAGE = 0.01


def broken_images(looks: Looks) -> DataVerdict | None:
    """Images that nothing can be learnt from; one is enough."""
    rows = [row for row, fault in enumerate(looks.faults) if fault]
    if not rows:
        return None
    return DataVerdict(
        "broken_images",
        len(rows) / len(looks),
        wilson(len(rows), len(looks)),
        len(looks),
        f"{len(rows):,} of {len(looks):,} images show nothing: {looks.faults[rows[0]]}, say",
        "leave them out (data.mask), or out of the source and pack again",
        tuple(looks.example(row, looks.faults[row]) for row in rows[:MOST_EXAMPLES]),
        leave_out=looks.ids_of(rows),
    )


def near_duplicates(looks: Looks, pairs: list[Pair], batch: int) -> DataVerdict | None:
    """Images that the set holds more than once, and what contrast makes of them.

    Args:
        looks: The set.
        pairs: Its rows that show the same picture.
        batch: Images of a global batch.
    """
    # Pairs that share an image id are never contrasted.
    other = [pair for pair in pairs if looks.ids[pair.first] != looks.ids[pair.second]]
    groups = groups_of(len(looks), other)
    sizes = list(Counter(groups).values())
    count = sum(size for size in sizes if size > 1)
    if count <= TOLERATED_COPIES * len(looks):
        return None
    rate = false_negative_rate(sizes, batch)
    return DataVerdict(
        "near_duplicates",
        count / len(looks),
        wilson(count, len(looks)),
        len(looks),
        f"{count:,} of {len(looks):,} images show the same picture as another; of a batch of "
        f"{batch:,}, {rate:.2%} of the images meet such a one as a negative",
        "keep one image of each group, or give the group one image id and all captions",
        _examples(looks, looks, other),
        {"false_negative_rate": rate, "batch": float(batch), "largest_group": float(max(sizes))},
        # The first of a group stays, with the rows that share its id.
        leave_out=looks.ids_of(
            row for row, group in enumerate(groups) if looks.ids[row] != looks.ids[group]
        ),
    )


def leakage(
    data: Looks, against: Looks, pairs: list[Pair], name: str | None = None
) -> DataVerdict | None:
    """Images of an evaluation set that the data shows too.

    Args:
        data: The set that is trained on.
        against: The evaluation set.
        pairs: Rows of `data` (first) and of `against` (second) that show the same picture.
        name: Of the evaluation set, where there are several.
    """
    held_out = {pair.second for pair in pairs}
    if len(held_out) <= TOLERATED_LEAKAGE * len(against):
        return None
    words = {wording(caption) for captions in data.captions for caption in captions}
    told = sum(wording(caption) in words for captions in against.captions for caption in captions)
    total = max(1, sum(map(len, against.captions)))
    return DataVerdict(
        "leakage",
        len(held_out) / len(against),
        wilson(len(held_out), len(against)),
        len(against),
        f"{len(held_out):,} of {len(against):,} evaluation images"
        f"{f' of {name}' if name else ''} show a picture of the data; {told / total:.2%} of the "
        "evaluation's captions stand in it word for word",
        "leave these images out of the data that is trained on (data.mask)",
        _examples(data, against, pairs),
        {"captions_in_both": told / total},
        leave_out=data.ids_of(pair.first for pair in pairs),
        held_out=name,
    )


def _examples(left: Looks, right: Looks, pairs: list[Pair]) -> tuple[Example, ...]:
    return tuple(
        left.example(pair.first, f"correlation {pair.score:.3f}", (right, pair.second))
        for pair in pairs[:MOST_EXAMPLES]
    )
