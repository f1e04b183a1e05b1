"""Packs a source into WebDataset shards with a manifest: checked images, equal bytes every time.

Records are cut into shards before anything is read, each shard is one task, and a finished shard
leaves a note beside it. So the bytes depend on neither the workers nor on where a run was killed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mmscale.data.image_checks import Treatment
from mmscale.data.manifest import Manifest, write_manifest
from mmscale.data.pack_folder import (
    REJECTED_NAME,
    count_rejected,
    finished_manifest,
    require_own_folder,
    settings_digest,
    write_rejected,
)
from mmscale.data.pool import map_ordered
from mmscale.data.shard_writer import Task, write_shard
from mmscale.data.sources import Source, read_source
from mmscale.errors import ConfigError, DataError


@dataclass(frozen=True)
class PackResult:
    """One split that was packed.

    Attributes:
        split: Its name.
        folder: Where its shards and manifest are.
        shards: Tars.
        samples: Images in them.
        captions: Captions in them.
        rejected: Lines of `rejected.txt`.
        kept: Shards that an earlier run had finished.
    """

    split: str
    folder: Path
    shards: int
    samples: int
    captions: int
    rejected: int
    kept: int

    def __str__(self) -> str:
        notes = []
        if self.rejected:
            notes.append(f"{self.rejected:,} rejected: see {REJECTED_NAME}")
        if self.kept:
            notes.append(f"{_counted(self.kept, 'shard')} of an earlier run kept")
        remarks = f" ({'; '.join(notes)})" if notes else ""
        return (
            f"{self.split}: {_counted(self.samples, 'image')}, "
            f"{_counted(self.captions, 'caption')} in {_counted(self.shards, 'shard')} "
            f"at {self.folder}{remarks}"
        )


def pack(
    source: Path,
    out: Path,
    split: str | None = None,
    samples_per_shard: int = 1000,
    resize: int | None = None,
    max_pixels: int = 89_478_485,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[PackResult]:
    """Pack a data set, one split a folder; goes on where an earlier run was stopped.

    Args:
        source: Folder or recipe of the data set.
        out: Folder of the shards; with `split` itself, else one folder a split inside it.
        split: The only split to pack.
        samples_per_shard: Records cut for each shard; rejected images leave it smaller.
        resize: Shrink images to this shorter side, pixels; others keep their bytes.
        max_pixels: Reject images with more.
        workers: Processes that check and write.
        progress: Called with images done and images in all.

    Raises:
        ConfigError: A number is below 1.
        DataError: Nothing to pack, every image rejected, or `out` holds another pack.
        LaunchError: A worker was killed.
    """
    _check(samples_per_shard, resize, max_pixels)
    data = read_source(source)
    splits = _choose(data, Path(source), split)
    advance = _counting(sum(record.split in splits for record in data.records), progress)
    treatment, out = Treatment(resize, max_pixels), Path(out)
    return [
        _pack_split(
            data,
            name,
            out if split is not None else out / name,
            treatment,
            samples_per_shard,
            workers,
            advance,
        )
        for name in splits
    ]


def _check(samples_per_shard: int, resize: int | None, max_pixels: int) -> None:
    if samples_per_shard < 1 or max_pixels < 1 or (resize is not None and resize < 1):
        raise ConfigError(
            f"samples_per_shard={samples_per_shard}, resize={resize} and max_pixels={max_pixels} "
            "must be at least 1"
        )


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


def _pack_split(
    data: Source,
    split: str,
    folder: Path,
    treatment: Treatment,
    samples_per_shard: int,
    workers: int,
    advance: Callable[[int], None],
) -> PackResult:
    records = [record for record in data.records if record.split == split]
    refused = [(r.key, r.reason) for r in data.rejected if r.split in (split, None)]
    settings = settings_digest(split, treatment, samples_per_shard, records, refused)
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [
        Task(
            folder,
            f"{split}-{start // samples_per_shard:06d}.tar",
            settings,
            treatment,
            tuple(records[start : start + samples_per_shard]),
        )
        for start in range(0, len(records), samples_per_shard)
    ]
    finished = finished_manifest(folder, settings)
    if finished is None:
        require_own_folder(folder, tasks)
        finished, rejected, kept = _write_all(data.name, split, tasks, refused, workers, advance)
    else:
        advance(len(records))
        rejected, kept = count_rejected(folder), len(finished.shards)
    for task in tasks:
        task.note.unlink(missing_ok=True)
    return PackResult(
        split, folder, len(finished.shards), finished.samples, finished.captions, rejected, kept
    )


def _write_all(
    source: str,
    split: str,
    tasks: list[Task],
    refused: list[tuple[str, str]],
    workers: int,
    advance: Callable[[int], None],
) -> tuple[Manifest, int, int]:
    """Write what is not there yet, then the list of rejected images, then the manifest."""
    folder = tasks[0].folder
    shards, rejected, kept = [], list(refused), 0
    for task, done in zip(tasks, map_ordered(write_shard, tasks, workers), strict=True):
        if done.shard is not None:
            shards.append(done.shard)
        rejected += done.rejected
        kept += done.kept
        advance(len(task.records))
    write_rejected(folder, rejected)
    if not shards:
        for task in tasks:
            task.note.unlink()
        key, reason = rejected[0]
        raise DataError(
            f"{folder}: nothing was packed: all {len(rejected)} images were rejected, "
            f"first {key}: {reason}; see {REJECTED_NAME}"
        )
    manifest = Manifest(split, source, tuple(shards), tasks[0].settings)
    write_manifest(folder, manifest)
    return manifest, len(rejected), kept


def _counted(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"
