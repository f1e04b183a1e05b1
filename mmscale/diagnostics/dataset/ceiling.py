"""The highest R@1 that an evaluation set allows, by the Karpathy protocol.

Whoever searches with a caption that two images have gets one of them first, and is wrong for the
other. An oracle that knows which image shows what, but cannot tell equal captions or equal images
from each other, answers equal queries alike, and orders equal candidates by chance. What it is
expected to find at best is the ceiling.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from mmscale.data.caption_text import wording


@dataclass(frozen=True)
class Ceiling:
    """What can be reached at most, in percent.

    Attributes:
        i2t_r1: Images whose first caption is theirs.
        t2i_r1: Captions whose first image is theirs.
        shared_captions: Captions that an image distinguishable from theirs has too.
        shared_images: Images that cannot be told from others.
    """

    i2t_r1: float
    t2i_r1: float
    shared_captions: int
    shared_images: int


def ceiling(
    captions: Sequence[str], owners: Sequence[int], looks: Sequence[int] | None = None
) -> Ceiling:
    """The ceiling where captions of equal words are the same, whatever their case and spaces.

    Args:
        captions: All captions of the set.
        owners: The image of each, from 0; every image has a caption.
        looks: For each image what it looks like: images of one number cannot be told apart, as
            copies and near-duplicates. Without it every image looks like itself only.
    """
    words = [wording(caption) for caption in captions]
    looks = range(max(owners) + 1) if looks is None else looks
    images_of_look = Counter(looks)
    # Captions of one wording, and how many of them images of one look have.
    wordings = Counter(words)
    together = Counter(zip(words, (looks[owner] for owner in owners), strict=True))
    best_caption: dict[int, float] = defaultdict(float)
    best_look: dict[str, float] = defaultdict(float)
    looks_of_wording: Counter[str] = Counter()
    for (said, look), count in together.items():
        # Of an image of the look, one of the captions of this wording comes first by chance.
        best_caption[look] = max(best_caption[look], count / wordings[said])
        best_look[said] = max(best_look[said], count / images_of_look[look])
        looks_of_wording[said] += 1
    return Ceiling(
        100 * sum(best_caption.values()) / len(looks),
        100 * sum(best_look.values()) / len(words),
        sum(looks_of_wording[said] > 1 for said in words),
        sum(count for count in images_of_look.values() if count > 1),
    )
