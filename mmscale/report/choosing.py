"""Which of the held-out pairs a page shows, and small copies of their photographs."""

import base64
import bisect
from collections.abc import Callable, Iterable
from contextlib import closing
from itertools import accumulate, islice

from torch import Tensor

from mmscale.data.decode import difference, thumbnail
from mmscale.data.reader import DamagedSampleError, SampleReader
from mmscale.data.shards import ShardSet
from mmscale.diagnostics.pairs import Pairs, Sources, first_pairs, thinned_rows
from mmscale.diagnostics.retrieval import Answer as Ranked
from mmscale.diagnostics.retrieval import best_and_worst
from mmscale.diagnostics.space import MAP_PAIRS
from mmscale.diagnostics.suspects import doubtful_captions, equal_captions, near_images
from mmscale.errors import DataError
from mmscale.report import examples
from mmscale.report.examples import PICTURE_PREFIX, Examples, Photo

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
    twins = (examples.Twins(photos=near) for near in search.near() if copies.look_the_same(*near))
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

    def points(self) -> tuple[examples.Point, ...]:
        """The pairs on the maps."""
        images, texts = (rows.tolist() for rows in first_pairs(self._pairs, MAP_PAIRS))
        captions = _sources_of(self._pairs).captions
        return tuple(
            examples.Point(photo=image, caption=captions[text])
            for image, text in zip(images, texts, strict=True)
        )

    def answers(self) -> tuple[tuple[examples.Answer, ...], tuple[examples.Answer, ...]]:
        """The best and the worst of both directions."""
        sides: dict[examples.Way, tuple[Tensor, Tensor, Tensor, Tensor]] = {
            "i2t": (self._image, self._text, self._image_ids, self._text_ids),
            "t2i": (self._text, self._image, self._text_ids, self._image_ids),
        }
        lists: tuple[list[examples.Answer], list[examples.Answer]] = [], []
        for way, (queries, candidates, query_ids, candidate_ids) in sides.items():
            found = best_and_worst(queries, candidates, query_ids, candidate_ids, ANSWERS)
            for answers, kept in zip(found, lists, strict=True):
                kept += [self._answer(way, answer, query_ids, candidate_ids) for answer in answers]
        return tuple(lists[0]), tuple(lists[1])

    def _answer(
        self, way: examples.Way, answer: Ranked, query_ids: Tensor, candidate_ids: Tensor
    ) -> examples.Answer:
        text = answer.right if way == "i2t" else answer.query
        found = tuple(
            examples.Found(
                photo=self._owners[row] if way == "i2t" else self._image_rows[row],
                caption=self._captions[row] if way == "i2t" else None,
                similarity=similarity,
                right=bool(candidate_ids[row] == query_ids[answer.query]),
            )
            for row, similarity in zip(answer.found, answer.similarities, strict=True)
        )
        return examples.Answer(
            way=way,
            photo=self._owners[text],
            caption=self._captions[text],
            rank=answer.rank,
            similarity=answer.similarity,
            found=found,
        )

    def doubts(self) -> list[examples.Doubt]:
        """Captions that hardly fit, the most doubtful first."""
        found = doubtful_captions(self._image, self._text, self._image_ids, self._text_ids)
        return [
            examples.Doubt(
                photo=self._image_rows[doubt.image],
                caption=self._captions[doubt.text],
                similarity=doubt.similarity,
                suggested=doubt.suggested,
            )
            for doubt in found
        ]

    def shared(self) -> list[examples.SharedCaption]:
        """Captions that several images have."""
        return [
            examples.SharedCaption(caption=caption, photos=tuple(photos[:_SHARERS]))
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
        self._starts = [0, *accumulate(shard.samples for shard in shards.shards)]
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
        shard = bisect.bisect_right(self._starts, place) - 1
        try:
            sample = self._reader.read(shard, place - self._starts[shard])
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
