"""A set of pairs read once, and what the data doctor says of it."""

import hashlib
import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from mmscale.data.damage import DamagedSampleError, reason_of
from mmscale.data.pixels import in_rgb
from mmscale.data.pool import map_ordered
from mmscale.data.reader import SampleReader
from mmscale.data.shards import ShardSet
from mmscale.diagnostics.dataset.captions import cut_captions, language_mix, repeated_captions
from mmscale.diagnostics.dataset.ceiling import Ceiling, ceiling
from mmscale.diagnostics.dataset.copies import SIDE, Pair, groups_of, same_pictures
from mmscale.diagnostics.dataset.images import broken_images, leakage, near_duplicates
from mmscale.diagnostics.dataset.verdict import DataVerdict, Looks
from mmscale.errors import DataError
from mmscale.evaluation.encoded import Tell
from mmscale.evaluation.seen import Fitting, Seen, fitting

# CLIP's text tower.
CONTEXT_LENGTH = 77
_SHORTEST_SIDE = 16  # pixels
_LONGEST_SHAPE = 8  # times as long as wide
# Deviation of grey values below which an image is blank.
_BLANK = 1.0


@dataclass(frozen=True)
class Examined:
    """What was found: the verdicts that apply, and the most that retrieval on this set can reach.

    Attributes:
        verdicts: None where the set is healthy.
        ceiling: Where there is a caption at all.
        images: Images read.
        captions: Their captions.
        fit: How pairs fit, where a model has seen them.
    """

    verdicts: tuple[DataVerdict, ...]
    ceiling: Ceiling
    images: int
    captions: int
    fit: Fitting | None = None


def examine(
    data: Looks,
    against: Mapping[str, Looks],
    batch: int,
    seen: Seen | None = None,
    tell: Tell = lambda line: None,
) -> Examined:
    """Every examination; those of how images and captions fit where a model has seen the set.

    Args:
        data: The set.
        against: Evaluation sets by name, whose pictures the data should not show; the name of a
            single one may be empty.
        batch: Images of the global batch that is planned.
        seen: What a model makes of the set.
        tell: Takes a line about what cannot be told.
    """
    everything = _joined(data, *against.values())
    pairs = same_pictures(everything.greys, everything.digests)
    num, begin = len(data), len(data)
    own = [pair for pair in pairs if pair.second < num]
    fit = fitting(data, seen, tell) if seen else None
    found = list(fit.verdicts if fit else ())
    for name, held_out in against.items():
        end = begin + len(held_out)
        across = [
            Pair(pair.first, pair.second - begin, pair.score)
            for pair in pairs
            if pair.first < num and begin <= pair.second < end
        ]
        found.append(leakage(data, held_out, across, name or None))
        begin = end
    found += [
        near_duplicates(data, own, batch),
        repeated_captions(data),
        cut_captions(data, seen.tokens, seen.context_length)
        if seen
        else cut_captions(data, _clip_tokens(), CONTEXT_LENGTH),
        language_mix(data),
        broken_images(data),
    ]
    captions = [caption for entry in data.captions for caption in entry]
    owners = [row for row, entry in enumerate(data.captions) for _ in entry]
    return Examined(
        tuple(verdict for verdict in found if verdict is not None),
        ceiling(captions, owners, groups_of(num, own)),
        num,
        len(captions),
        fit,
    )


def look_at(
    shards: ShardSet, workers: int = 1, progress: Callable[[int, int], None] | None = None
) -> Looks:
    """Read a set, every image once.

    Args:
        shards: The set.
        workers: Processes that read shards.
        progress: Called with images done and images in all.

    Raises:
        DataError: A shard cannot be read, or none of the samples.
    """
    parts, done = list[Looks](), 0
    for part in map_ordered(partial(_look_at_shard, shards), range(len(shards.shards)), workers):
        parts.append(part)
        done += len(part)
        if progress:
            progress(done, shards.samples)
    looks = _joined(*parts)
    if not len(looks):
        raise DataError("no sample of these shards can be read; see mmscale verify")
    return looks


def _look_at_shard(shards: ShardSet, shard: int) -> Looks:
    reader = SampleReader(shards)
    keys, ids, places, digests, faults, greys, captions = [], [], [], [], [], [], []
    try:
        for place in range(shards.shards[shard].samples):
            try:
                sample = reader.read(shard, place)
            except DamagedSampleError:
                # What is no sample has no caption either; verify names it.
                continue
            grey, fault = grey_of(sample.image)
            keys.append(sample.key)
            ids.append(sample.image_id)
            places.append(shards.starts[shard] + place)
            digests.append(hashlib.blake2b(sample.image, digest_size=16).digest())
            faults.append(fault)
            greys.append(grey)
            captions.append(sample.captions)
    finally:
        reader.close()
    table = np.stack(greys) if greys else np.zeros((0, SIDE, SIDE), np.uint8)
    numbers = np.array(ids, np.int64), np.array(places, np.int64)
    return Looks(keys, *numbers, digests, faults, table, captions)


def grey_of(content: bytes) -> tuple[np.ndarray, str]:
    """A grey thumbnail of an encoded image [SIDE SIDE], and why the image is useless, if it is."""
    nothing = np.zeros((SIDE, SIDE), np.uint8)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP")) as image:
                width, height = image.size
                image.draft("L", (4 * SIDE, 4 * SIDE))
                # As training reads it.
                grey_image = image if image.mode == "L" else in_rgb(image).convert("L")
                small = grey_image.resize((SIDE, SIDE), Image.Resampling.BOX)
    except Exception as error:  # noqa: BLE001 - whatever damaged bytes make a decoder raise
        return nothing, f"it cannot be decoded ({reason_of(error)})"
    grey = np.asarray(small)
    if min(width, height) < _SHORTEST_SIDE:
        return grey, f"it is {width} x {height} pixels"
    if max(width, height) > _LONGEST_SHAPE * min(width, height):
        return grey, f"it is a strip of {width} x {height} pixels"
    if grey.std() < _BLANK:
        return grey, "it is blank"
    return grey, ""


def _joined(*parts: Looks) -> Looks:
    return Looks(
        [key for part in parts for key in part.keys],
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.places for part in parts]),
        [digest for part in parts for digest in part.digests],
        [fault for part in parts for fault in part.faults],
        np.concatenate([part.greys for part in parts]),
        [captions for part in parts for captions in part.captions],
    )


def _clip_tokens() -> Callable[[str], int]:
    # Imported here: OpenCLIP takes a second to load.
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    return lambda caption: len(tokenizer.encode(caption)) + 2


def to_leave_out(examined: Examined, shards: ShardSet) -> dict[str, set[int]]:
    """What a mask of the verdicts leaves out: ids as the manifests have them, by their digests.

    Args:
        examined: What was found.
        shards: The set.
    """
    wanted = {image for verdict in examined.verdicts for image in verdict.leave_out}
    found: dict[str, set[int]] = {name: set() for name in shards.manifests}
    for number, (shard, name) in enumerate(zip(shards.shards, shards.manifests, strict=True)):
        if shard.identities is not None:
            there = wanted.intersection(shard.identities.images)
            found[name] |= {shards.image_id(number, image) for image in there}
    return {name: ids for name, ids in found.items() if ids}
