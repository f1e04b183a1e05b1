"""What the data doctor says of a set, and what was read of it once."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

MOST_EXAMPLES = 24
_NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Example:
    """One image that a verdict is about.

    Attributes:
        key: Its name.
        image_id: Of the image.
        what: What is wrong with it: a caption, a reason, the score of a pair.
        place: Where it stands in its set.
        partner: Name of the other image, where the verdict is about two.
        partner_place: Where that stands in its own set.
    """

    key: str
    image_id: int
    what: str
    place: int
    partner: str | None = None
    partner_place: int | None = None


@dataclass(frozen=True)
class DataVerdict:
    """A fault of a data set.

    Attributes:
        verdict: Its name.
        share: Share of `sample` that it concerns.
        interval: 95 % of the share in the data that this is a sample of.
        sample: How many images or captions were looked at.
        sentence: What was found.
        remedy: What to do.
        examples: The clearest first.
        evidence: The figures behind it.
        leave_out: Ids of the images that a mask leaves out, the surest first.
        held_out: Name of the evaluation set that it is about too.
    """

    verdict: str
    share: float
    interval: tuple[float, float]
    sample: int
    sentence: str
    remedy: str
    examples: tuple[Example, ...] = ()
    evidence: Mapping[str, float] = field(default_factory=dict)
    leave_out: tuple[int, ...] = ()
    held_out: str | None = None


@dataclass(frozen=True)
class Looks:
    """What was read of the images of a set, row by row in the data's order.

    Attributes:
        keys: Names.
        ids: Image ids [n], int64.
        places: Of the images in their set [n], int64.
        digests: A digest of each image's bytes.
        faults: Why an image is useless; empty where it is sound.
        greys: Grey thumbnails [n SIDE SIDE], uint8; zeros where there is no image.
        captions: Of each image.
    """

    keys: list[str]
    ids: np.ndarray
    places: np.ndarray
    digests: list[bytes]
    faults: list[str]
    greys: np.ndarray
    captions: list[tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, rows: np.ndarray) -> "Looks":
        """Some of the rows."""
        chosen = rows.tolist()
        return Looks(
            [self.keys[row] for row in chosen],
            self.ids[rows],
            self.places[rows],
            [self.digests[row] for row in chosen],
            [self.faults[row] for row in chosen],
            self.greys[rows],
            [self.captions[row] for row in chosen],
        )

    def example(self, row: int, what: str, partner: "tuple[Looks, int] | None" = None) -> Example:
        """What is wrong with a row; `partner`: the other image's set and its row there."""
        beside = () if partner is None else (partner[0].keys[partner[1]],)
        there = () if partner is None else (int(partner[0].places[partner[1]]),)
        own = self.keys[row], int(self.ids[row]), what, int(self.places[row])
        return Example(*own, *beside, *there)

    def ids_of(self, rows: Iterable[int]) -> tuple[int, ...]:
        """Image ids of rows, each once, in the order of the rows."""
        return tuple(dict.fromkeys(self.ids[np.fromiter(rows, np.int64)].tolist()))


def wilson(count: int, sample: int) -> tuple[float, float]:
    """95 % interval of a share, after Wilson 1927 (J. Am. Stat. Assoc. 22)."""
    if sample == 0:
        return 0.0, 1.0
    share, square = count / sample, _NORMAL_95**2 / sample
    middle = share + square / 2
    half = math.sqrt(square * share * (1 - share) + square**2 / 4)
    return max(0.0, (middle - half) / (1 + square)), min(1.0, (middle + half) / (1 + square))
