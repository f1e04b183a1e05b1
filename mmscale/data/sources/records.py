"""What `read_source` gives: the images of a data set with their captions, and what was left out."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Record:
    """One image with its captions.

    Attributes:
        key: Its name in a shard: no dot, no slash, no blank.
        image: The image file; not looked at yet.
        captions: At least one, none empty.
        split: `train`, `val`, `test`, or a name of the source's own.
        source: Name of the data set.
        image_id: The source's own identity of the image, where it has one.
        label: Class of the image, where it has one: a number, or a name as a source gives it.
        group: Name of the group of images that it counts as one with, where it has one.
    """

    key: str
    image: Path
    captions: tuple[str, ...]
    split: str
    source: str
    image_id: int | None = None
    label: int | str | None = None
    group: str | None = None


@dataclass(frozen=True)
class Rejection:
    """An image or caption that was left out; `split` is None where nothing tells it."""

    key: str
    reason: str
    split: str | None = None


@dataclass(frozen=True)
class Source:
    """A data set that was read.

    Attributes:
        name: Its name.
        described_by: The files that the captions came from.
        records: Its images in the order of those files.
        rejected: What was left out, and why.
        classes: Names of the labels' numbers, where the labels had names.
        notes: What a person should know about how it was read, a line each.
        tells_splits: Whether anything said of which split an image is.
    """

    name: str
    described_by: tuple[Path, ...]
    records: tuple[Record, ...]
    rejected: tuple[Rejection, ...]
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    tells_splits: bool = False

    @property
    def splits(self) -> tuple[str, ...]:
        """Splits that have records: train, val, test, then others by name."""
        usual = ("train", "val", "test")
        found = {record.split for record in self.records}
        return (*(s for s in usual if s in found), *sorted(found.difference(usual)))
