"""Packs a source into WebDataset shards with a manifest: checked images, equal bytes every time.

Records are cut into shards before anything is read, each shard is one task, and a finished shard
leaves a note beside it. So the bytes depend on neither the workers nor on where a run was killed,
and several processes may each write a part of the shards: whoever finds every note writes the
manifest.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmscale.config.data import ColumnsConfig
from mmscale.data.damage import MOST_LEFT_OUT, are_too_many
from mmscale.data.manifest import Manifest, with_identities, write_manifest
from mmscale.data.pack_folder import (
    REJECTED_NAME,
    PackPart,
    PackResult,
    clean_folder,
    finished_manifest,
    read_reasons,
    require_own_folder,
    settings_digest,
    without_copies,
    write_rejected,
)
from mmscale.data.pool import map_ordered
from mmscale.data.shard_writer import Done, Task, Treatment, read_done, write_shard
from mmscale.data.sources import Record, Rejection, Source, read_source
from mmscale.data.sources.read import is_there
from mmscale.data.sources.records import held_out
from mmscale.errors import ConfigError, DataError

# Of rejected images, told with their counts.
_REASONS = 3


@dataclass(frozen=True)
class PackSettings:
    """What is packed of a data set, and how.

    Attributes:
        split: The only split to pack, into the folder itself; None: each into one of its own.
        samples_per_shard: Records cut for each shard; rejected images leave it smaller.
        resize: Shrink images to this shorter side, pixels; others keep their bytes.
        quality: Encode all images anew with this quality; without it those that are shrunk, at 95.
        max_pixels: Reject images with more.
        images: Folder of the images, where it cannot be found beside the captions.
        hold_out: Share of the images that become `val`, where the source tells no splits.
        most_left_out: Share of a split's images that may be missing or useless.
        columns: Which columns of a table are what; the rest is guessed by name.
    """

    split: str | None = None
    samples_per_shard: int = 1000
    resize: int | None = None
    quality: int | None = None
    max_pixels: int = 89_478_485
    images: Path | None = None
    hold_out: float = 0.0
    most_left_out: float = MOST_LEFT_OUT
    columns: ColumnsConfig | None = None


_DEFAULT, _ALL = PackSettings(), PackPart()


def pack(
    source: Path,
    out: Path,
    settings: PackSettings = _DEFAULT,
    *,
    workers: int = 1,
    part: PackPart = _ALL,
    progress: Callable[[int, int], None] | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> list[PackResult]:
    """Pack a data set, one split a folder; goes on where an earlier run was stopped.

    Args:
        source: Folder, caption file or recipe of the data set.
        out: Folder of the shards, or of a folder for each split.
        settings: What is packed, and how.
        workers: Processes that check and write.
        part: The shards that are this process's to write; default all.
        progress: Called with images done and images in all.
        tell: Called with a line for what a person should know about the source.

    Raises:
        ConfigError: A number is out of its range, or `out` cannot be written.
        DataError: Nothing to pack, too many images rejected, or `out` holds another pack.
        LaunchError: A worker was killed.
    """
    _check(settings)
    data = read_source(source, settings.images, settings.columns)
    if settings.hold_out:
        data = held_out(data, settings.hold_out)
    return pack_source(
        data, out, settings, workers=workers, part=part, progress=progress, tell=tell
    )


def pack_source(
    data: Source,
    out: Path,
    settings: PackSettings = _DEFAULT,
    *,
    workers: int = 1,
    part: PackPart = _ALL,
    progress: Callable[[int, int], None] | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> list[PackResult]:
    """As `pack`, of a source that was read already."""
    for note in data.notes:
        tell(note)
    splits = _choose(data, data.place, settings.split)
    records, copies = without_copies(data.records, workers)
    if copies:
        tell(
            f"{len(copies):,} images have the bytes of another and are left out with their "
            "captions; give one name to an image that has several captions"
        )
    plans = []
    for name in splits:
        folder = Path(out) if settings.split is not None else Path(out) / name
        mine = [record for record in records if record.split == name]
        _require_images(mine, settings.most_left_out)
        refused = _refused((*data.rejected, *copies), name)
        plans.append(_plan(data, name, folder, settings, mine, refused))
    total = sum(len(task.records) for plan in plans for task in plan.of(part))
    advance = _counting(total, progress)
    try:
        return [_pack_split(plan, part, workers, advance) for plan in plans]
    except OSError as error:
        raise ConfigError(
            f"out={out}: cannot be written ({error.strerror}); make room there or choose another "
            "folder, and run again: finished shards are kept"
        ) from error


def _check(settings: PackSettings) -> None:
    size, resize, most = settings.samples_per_shard, settings.resize, settings.max_pixels
    if size < 1 or most < 1 or (resize is not None and resize < 1):
        raise ConfigError(
            f"samples_per_shard={size}, resize={resize} and max_pixels={most} must be at least 1"
        )
    quality = settings.quality
    if quality is not None and not 1 <= quality <= 100:
        raise ConfigError(f"quality={quality} is not a quality; give 1 to 100")


def _counting(total: int, progress: Callable[[int, int], None] | None) -> Callable[[int], None]:
    """A function that adds to the images done and tells `progress`."""
    done = 0

    def advance(images: int) -> None:
        nonlocal done
        done += images
        if progress:
            progress(done, total)

    return advance


def _choose(data: Source, path: Path, split: str | None) -> tuple[str, ...]:
    if not data.splits:
        first = (
            f", first {data.rejected[0].key}: {data.rejected[0].reason}" if data.rejected else ""
        )
        raise DataError(f"{path}: no image has a caption ({len(data.rejected)} rejected{first})")
    if split is None:
        return data.splits
    if split not in data.splits:
        raise DataError(f"{path}: has no split {split}; it has {', '.join(data.splits)}")
    return (split,)


def _refused(rejected: Iterable[Rejection], split: str) -> list[tuple[str, str]]:
    return [(one.key, one.reason) for one in rejected if one.split in (split, None)]


@dataclass(frozen=True)
class _Plan:
    """One split to pack: its shards, and what was left out before any image was read."""

    data: Source
    split: str
    folder: Path
    digest: str
    tasks: tuple[Task, ...]
    refused: list[tuple[str, str]]
    most_left_out: float

    def of(self, part: PackPart) -> tuple[Task, ...]:
        """The shards that are a part's to write."""
        return self.tasks[part.index - 1 :: part.count]


def _plan(
    data: Source,
    split: str,
    folder: Path,
    settings: PackSettings,
    records: list[Record],
    refused: list[tuple[str, str]],
) -> _Plan:
    treatment = Treatment(settings.resize, settings.quality, settings.max_pixels)
    size = settings.samples_per_shard
    digest = settings_digest(split, treatment, size, records, refused)
    tasks = tuple(
        Task(
            folder,
            f"{split}-{start // size:06d}.tar",
            digest,
            treatment,
            tuple(records[start : start + size]),
        )
        for start in range(0, len(records), size)
    )
    return _Plan(data, split, folder, digest, tasks, refused, settings.most_left_out)


def _pack_split(
    plan: _Plan, part: PackPart, workers: int, advance: Callable[[int], None]
) -> PackResult:
    plan.folder.mkdir(parents=True, exist_ok=True)
    mine = plan.of(part)
    manifest, kept = finished_manifest(plan.folder, plan.digest), len(mine)
    if manifest:
        advance(sum(len(task.records) for task in mine))
    else:
        require_own_folder(plan.folder, plan.tasks)
        written = {}
        for task, done in zip(mine, map_ordered(write_shard, mine, workers), strict=True):
            written[task.name] = done
            advance(len(task.records))
        everyone = [written.get(task.name) or read_done(task) for task in plan.tasks]
        kept = sum(done.kept for done in written.values())
        # The notes of other parts are gone once one of them has written the manifest.
        manifest = finished_manifest(plan.folder, plan.digest, trust=True)
        if manifest is None and None in everyone:
            return _unfinished(plan, list(written.values()), everyone.count(None))
        manifest = manifest or _finish(plan, [done for done in everyone if done])
    clean_folder(plan.folder, plan.tasks)
    reasons = read_reasons(plan.folder)
    return PackResult(
        plan.split,
        plan.folder,
        len(manifest.shards),
        manifest.samples,
        manifest.captions,
        sum(reasons.values()),
        kept,
        tuple(reasons.most_common(_REASONS)),
    )


def _unfinished(plan: _Plan, written: list[Done], missing: int) -> PackResult:
    """What one part did while others are not done."""
    shards = [done.shard for done in written if done.shard]
    return PackResult(
        plan.split,
        plan.folder,
        len(shards),
        sum(shard.samples for shard in shards),
        sum(sum(shard.captions) for shard in shards),
        sum(len(done.rejected) for done in written),
        sum(done.kept for done in written),
        missing=missing,
    )


def _finish(plan: _Plan, everyone: list[Done]) -> Manifest:
    """Write the list of rejected images, then the manifest."""
    rejected = [*plan.refused, *(line for done in everyone for line in done.rejected)]
    write_rejected(plan.folder, rejected)
    packed = [done for done in everyone if done.shard]
    if not packed:
        clean_folder(plan.folder, plan.tasks)
        key, reason = rejected[0]
        raise DataError(
            f"{plan.folder}: nothing was packed: all {len(rejected)} images were rejected, "
            f"first {key}: {reason}; see {REJECTED_NAME}"
        )
    useless = sum(len(done.rejected) for done in everyone)
    total = sum(len(task.records) for task in plan.tasks)
    _require_few(plan.folder, useless, total, plan.most_left_out)
    identified, _ = with_identities(
        [done.shard for done in packed if done.shard], [done.traits for done in packed]
    )
    manifest = Manifest(plan.split, plan.data.name, identified, plan.digest, plan.data.classes)
    write_manifest(plan.folder, manifest)
    return manifest


def _require_few(where: object, left_out: int, total: int, most: float) -> None:
    """Refuse to go on where too many images cannot be used."""
    if are_too_many(left_out, total, most):
        raise DataError(
            f"{where}: {left_out:,} of {total:,} images were rejected, more than --max-left-out "
            f"{most:g} allows; rejected.txt there says why, --max-left-out 1 goes on with the rest"
        )


def _require_images(records: Sequence[Record], most: float) -> None:
    """Refuse a data set of which too many image files are not there, before anything is packed."""
    missing = [record for record in records if not is_there(record.image)]
    if are_too_many(len(missing), len(records), most):
        first = missing[0]
        folder = first.image.parent if isinstance(first.image, Path) else first.image.file
        raise DataError(
            f"{folder}: {len(missing):,} of {len(records):,} images of {first.split} "
            f"are missing, first {first.image.name}, more than --max-left-out {most:g} allows; put "
            "them there, name their folder with --images, or pack the rest with --max-left-out 1"
        )
