"""`examples.json`: the photographs and captions that a page shows, small copies of them inside.

Made when a run ends, while the shards are at hand; a page is written from the run folder alone.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmscale.durable import replace_file
from mmscale.errors import DataError

EXAMPLES_NAME = "examples.json"
PICTURE_PREFIX = "data:image/webp;base64,"


Way = Literal["i2t", "t2i"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Photo(_Record):
    """An image: its identity, its key in the shards, and a small copy where it could be read."""

    id: int
    key: str
    picture: Annotated[str, Field(pattern=f"^{PICTURE_PREFIX}[A-Za-z0-9+/=]*$")] | None


class Point(_Record):
    """A pair on the maps."""

    photo: int
    caption: str


class Found(_Record):
    """One candidate that a query found."""

    photo: int
    caption: str | None
    similarity: float
    right: bool


class Answer(_Record):
    """A query, its first candidates, and the first right one with its rank."""

    way: Way
    photo: int
    caption: str
    rank: int
    similarity: float
    found: tuple[Found, ...]


class Doubt(_Record):
    """A caption that fits its image less than its neighbours would."""

    photo: int
    caption: str
    similarity: float
    suggested: float


class Twins(_Record):
    """Two images that look the same."""

    photos: tuple[int, int]


class SharedCaption(_Record):
    """A caption of several images."""

    caption: str
    photos: tuple[int, ...]


class Examples(_Record):
    """All that a page shows of the held-out pairs.

    Attributes:
        photos: By the number that the others name.
        points: On the maps.
        best: Answers with the largest lead, of both directions.
        worst: Answers whose right candidate comes last.
        doubts: The most doubtful captions.
        num_doubts: How many stand out in all.
        twins: Images that look the same under different ids.
        shared: Captions that images of different ids share.
        num_shared: How many there are in all.
        searched: Which pairs the last three kinds are of.
    """

    photos: dict[int, Photo] = {}
    points: tuple[Point, ...] = ()
    best: tuple[Answer, ...] = ()
    worst: tuple[Answer, ...] = ()
    doubts: tuple[Doubt, ...] = ()
    num_doubts: int = 0
    twins: tuple[Twins, ...] = ()
    shared: tuple[SharedCaption, ...] = ()
    num_shared: int = 0
    searched: str = "held-out pairs"

    def write(self, run_dir: Path) -> None:
        """Write what `read` reads."""
        replace_file(run_dir / EXAMPLES_NAME, self.model_dump_json().encode())

    @classmethod
    def read(cls, run_dir: Path) -> "Examples":
        """The examples of a run; empty where it has none.

        Raises:
            DataError: The file is not what `write` writes.
        """
        path = run_dir / EXAMPLES_NAME
        if not path.exists():
            return cls()
        try:
            examples = cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"{path}: not the examples of a run ({reason}); remove it") from error
        if missing := examples.named_photos() - set(examples.photos):
            raise DataError(f"{path}: names photo {min(missing)}, which it lacks; remove the file")
        return examples

    def with_suspects_of(self, other: "Examples") -> "Examples":
        """These with another set's doubtful and repeated pairs in the place of their own."""
        shift = 1 + max(self.photos, default=-1)

        def moved(photos: Iterable[int]) -> tuple[int, ...]:
            return tuple(photo + shift for photo in photos)

        updates = {
            "doubts": tuple(
                entry.model_copy(update={"photo": entry.photo + shift}) for entry in other.doubts
            ),
            "num_doubts": other.num_doubts,
            "twins": tuple(
                entry.model_copy(update={"photos": moved(entry.photos)}) for entry in other.twins
            ),
            "shared": tuple(
                entry.model_copy(update={"photos": moved(entry.photos)}) for entry in other.shared
            ),
            "num_shared": other.num_shared,
            "searched": other.searched,
        }
        both = self.model_copy(update=updates)
        photos = self.photos | {row + shift: photo for row, photo in other.photos.items()}
        named = both.named_photos()
        return both.model_copy(
            update={"photos": {row: photo for row, photo in photos.items() if row in named}}
        )

    def named_photos(self) -> set[int]:
        """Numbers of all photos that something names."""
        answers = (*self.best, *self.worst)
        return (
            {point.photo for point in self.points}
            | {answer.photo for answer in answers}
            | {doubt.photo for doubt in self.doubts}
            | {found.photo for answer in answers for found in answer.found}
            | {photo for twins in self.twins for photo in twins.photos}
            | {photo for caption in self.shared for photo in caption.photos}
        )
