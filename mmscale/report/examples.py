"""`examples.json`: the pairs that a page shows, how they are chosen, small copies of them inside.

Made when a run ends, while the shards are at hand; a page is written from the run folder alone.
"""

import base64
from collections.abc import Callable, Iterable
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from mmscale.data.pixels import difference, thumbnail
from mmscale.data.reader import DamagedSampleError, SampleReader
from mmscale.data.shards import ShardSet
from mmscale.diagnostics.pairs import Pairs, Sources, first_pairs, thinned_rows
from mmscale.diagnostics.retrieval import QueryRank, best_and_worst
from mmscale.diagnostics.space import MAP_PAIRS
from mmscale.diagnostics.suspects import doubtful_captions, equal_captions, near_images
from mmscale.errors import DataError
from mmscale.outputs import replace_file

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


LARGEST_SAMPLE = 5000
ANSWERS = 4  # of each direction, in each list
DOUBTS = 8
TWINS = 6
SHARED = 6
# Photographs shown of those that share a caption.
_SHARERS = 4
_CANDIDATES = 40
# Mean difference of a channel below which two small copies show the same picture.
_SAME_PICTURE = 4.0


def choose_examples(pairs: Pairs, shards: ShardSet, warn: Callable[[str], None]) -> Examples:
    """What to show of the held-out pairs; at most `LARGEST_SAMPLE` of the images are searched.

    Args:
        pairs: The set's embeddings with their sources, on the CPU.
        shards: The set.
        warn: Takes a line where photographs cannot be shown.
    """
    search = _Search(pairs)
    best, worst = search.answers()
    with closing(_Copies(pairs, shards, warn)) as copies:
        suspects = _suspects(search, copies)
        chosen = suspects.model_copy(
            update={"points": search.points(), "best": best, "worst": worst}
        )
        return copies.filled(chosen)


def choose_suspects(
    pairs: Pairs, shards: ShardSet, name: str, warn: Callable[[str], None]
) -> Examples:
    """Only the doubtful and the repeated pairs of any set; `name` is what the page calls it."""
    with closing(_Copies(pairs, shards, warn)) as copies:
        suspects = _suspects(_Search(pairs), copies)
        return copies.filled(suspects.model_copy(update={"searched": name}))


def _suspects(search: "_Search", copies: "_Copies") -> Examples:
    doubts, shared = search.doubts(), search.shared()
    twins = (Twins(photos=near) for near in search.near() if copies.look_the_same(*near))
    return Examples(
        doubts=tuple(doubts[:DOUBTS]),
        num_doubts=len(doubts),
        twins=tuple(islice(twins, TWINS)),
        shared=tuple(shared[:SHARED]),
        num_shared=len(shared),
    )


class _Search:
    """Looks through a set, thinned to distinct images with all of their captions."""

    def __init__(self, pairs: Pairs) -> None:
        self._pairs, sources = pairs, _sources_of(pairs)
        images, texts = thinned_rows(pairs, LARGEST_SAMPLE)
        self._image_rows, self._text_rows = images.tolist(), texts.tolist()
        self._image, self._text = pairs.image[images], pairs.text[texts]
        self._image_ids, self._text_ids = pairs.image_ids[images], pairs.text_ids[texts]
        backbone = pairs.backbone_image
        self._features = self._image if backbone is None else backbone[images]
        self._captions = [sources.captions[row] for row in self._text_rows]
        row_of = {int(number): row for row, number in enumerate(self._image_ids.tolist())}
        self._owners = [self._image_rows[row_of[number]] for number in self._text_ids.tolist()]

    def points(self) -> tuple[Point, ...]:
        """The pairs on the maps."""
        images, texts = (rows.tolist() for rows in first_pairs(self._pairs, MAP_PAIRS))
        captions = _sources_of(self._pairs).captions
        return tuple(
            Point(photo=image, caption=captions[text])
            for image, text in zip(images, texts, strict=True)
        )

    def answers(self) -> tuple[tuple[Answer, ...], tuple[Answer, ...]]:
        """The best and the worst of both directions."""
        sides: dict[Way, tuple[Tensor, Tensor, Tensor, Tensor]] = {
            "i2t": (self._image, self._text, self._image_ids, self._text_ids),
            "t2i": (self._text, self._image, self._text_ids, self._image_ids),
        }
        lists: tuple[list[Answer], list[Answer]] = [], []
        for way, (queries, candidates, query_ids, candidate_ids) in sides.items():
            found = best_and_worst(queries, candidates, query_ids, candidate_ids, ANSWERS)
            for answers, kept in zip(found, lists, strict=True):
                kept += [self._answer(way, answer, query_ids, candidate_ids) for answer in answers]
        return tuple(lists[0]), tuple(lists[1])

    def _answer(
        self, way: Way, answer: QueryRank, query_ids: Tensor, candidate_ids: Tensor
    ) -> Answer:
        text = answer.right if way == "i2t" else answer.query
        found = tuple(
            Found(
                photo=self._owners[row] if way == "i2t" else self._image_rows[row],
                caption=self._captions[row] if way == "i2t" else None,
                similarity=similarity,
                right=bool(candidate_ids[row] == query_ids[answer.query]),
            )
            for row, similarity in zip(answer.found, answer.similarities, strict=True)
        )
        return Answer(
            way=way,
            photo=self._owners[text],
            caption=self._captions[text],
            rank=answer.rank,
            similarity=answer.similarity,
            found=found,
        )

    def doubts(self) -> list[Doubt]:
        """Captions that hardly fit, the most doubtful first."""
        found = doubtful_captions(self._image, self._text, self._image_ids, self._text_ids)
        return [
            Doubt(
                photo=self._image_rows[doubt.image],
                caption=self._captions[doubt.text],
                similarity=doubt.similarity,
                suggested=doubt.suggested,
            )
            for doubt in found
        ]

    def shared(self) -> list[SharedCaption]:
        """Captions that several images have."""
        return [
            SharedCaption(caption=caption, photos=tuple(photos[:_SHARERS]))
            for caption, photos in equal_captions(self._captions, self._owners)
        ]

    def near(self) -> Iterable[tuple[int, int]]:
        """Images that may be the same, the nearest first."""
        for twins in near_images(self._features, _CANDIDATES):
            yield self._image_rows[twins.first], self._image_rows[twins.second]


class _Copies:
    """Small copies of a set's photographs, each read once; none where they cannot be read."""

    def __init__(self, pairs: Pairs, shards: ShardSet, warn: Callable[[str], None]) -> None:
        self._sources, self._warn = _sources_of(pairs), warn
        self._ids = pairs.image_ids.tolist()
        self._shards = shards
        self._reader: SampleReader | None = SampleReader(shards)
        self._made: dict[int, bytes | None] = {}

    def filled(self, chosen: Examples) -> Examples:
        """The same with the photographs that it names."""
        photos = {
            row: Photo(id=self._ids[row], key=self._sources.keys[row], picture=self.picture(row))
            for row in sorted(chosen.named_photos())
        }
        return chosen.model_copy(update={"photos": photos})

    def picture(self, row: int) -> str | None:
        """As an address that holds the picture itself."""
        content = self._copy(row)
        return None if content is None else PICTURE_PREFIX + base64.b64encode(content).decode()

    def look_the_same(self, first: int, second: int) -> bool:
        copies = self._copy(first), self._copy(second)
        if copies[0] is None or copies[1] is None:
            return False
        return difference(copies[0], copies[1]) < _SAME_PICTURE

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()

    def _copy(self, row: int) -> bytes | None:
        if row not in self._made:
            self._made[row] = self._read(row)
        return self._made[row]

    def _read(self, row: int) -> bytes | None:
        if self._reader is None:
            return None
        place = int(self._sources.places[row])
        try:
            sample = self._reader.read(*self._shards.sample_at(place))
            return thumbnail(sample.image, sample.key)
        except DamagedSampleError:
            return None
        except DataError as error:
            self._warn(f"the report goes without photographs: {error}")
            self._reader.close()
            self._reader = None
            return None


def _sources_of(pairs: Pairs) -> Sources:
    assert pairs.sources is not None, "examples are of a set that can be read"
    return pairs.sources
