"""Sources that are no shards yet, as settings name them: packed once into a cache, then read there.

What is packed lies in a folder that is called by the digest of the source and of what was asked of
it: a source that changed is packed beside, and whoever reads the pack before is not disturbed.
"""

import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mmscale.config.data import ColumnsConfig, DataConfig
from mmscale.data.manifest import MANIFEST_NAME
from mmscale.data.progress import progress_lines
from mmscale.data.sources import Source, read_source
from mmscale.data.sources.layouts import is_source_folder
from mmscale.data.sources.read import CAPTION_FILES
from mmscale.data.sources.records import held_out
from mmscale.data.sources.state import state_of
from mmscale.data.sources.typed import HUB
from mmscale.errors import DataError, printable
from mmscale.outputs import replace_file, user_cache, writing

# Changes when the same source would be read otherwise.
_VERSION = 1
_BESIDE = ".mmscale"
_SOURCE = "source.json"
_POLL_SECONDS = 0.2
# `mmscale examine DATA` looks at what would be trained on.
_TRAINED_ON = ("data.train", "DATA")


def _tell(line: str) -> None:
    sys.stderr.write(f"{printable(line)}\n")
    sys.stderr.flush()


@dataclass(frozen=True)
class Intake:
    """How sources that are no shards are taken in.

    Attributes:
        cache: Folder of what is packed; None: beside the source, or in the user's cache.
        columns: Which columns of a table are what; the rest is guessed.
        hold_out: Share that becomes `val`, where the source tells no splits.
        tell: Takes a line on what is done.
    """

    cache: str | None = None
    columns: ColumnsConfig | None = None
    hold_out: float | None = None
    tell: Callable[[str], None] = _tell

    @classmethod
    def of(cls, data: DataConfig, setting: str = "data.train") -> "Intake":
        """As a run's settings say; a share is held out of `data.train` and `data.eval` only."""
        own = setting in ("data.train", "data.eval")
        columns = None if data.columns == ColumnsConfig() else data.columns
        return cls(data.cache, columns, data.hold_out if own else None)

    def folder(self, setting: str, where: str) -> str:
        """Where the shards of a place are: itself, or the folder that it was packed into.

        Args:
            setting: Name of the setting or option. `data.train` and DATA take the split `train`,
                others `val`, or `test` where there is no `val`; without splits it is everything.
            where: Its value, one place.

        Raises:
            ConfigError: The cache cannot be written.
            DataError: The source cannot be packed, or has no such split.
        """
        if not is_source(where):
            return where
        path = Path(where)
        state = state_of(path, self.columns)
        plan = (_VERSION, _identity(where), self._asked())
        digest = hashlib.sha256(json.dumps([*plan, state.digest]).encode()).hexdigest()
        stem = "".join(c if c.isalnum() or c in "._-" else "_" for c in where.rpartition("/")[2])
        name = f"{stem.strip('.') or 'data'}-{digest[:16]}"
        splits = ["train"] if setting in _TRAINED_ON else ["val", "test"]
        caches = self._caches(path, where)
        for cache in caches:
            if (found := _packed(cache / name, splits)) is not None:
                self._say(f"{setting}={where}: packed before, at {found}")
                return str(found)
        return str(self._pack(setting, where, _writable(caches) / name, splits, state.source))

    def _asked(self) -> list[object]:
        return [self.columns and self.columns.model_dump(), self.hold_out]

    def _caches(self, path: Path, where: str) -> list[Path]:
        """Folders that may hold packs of a source, best first."""
        if self.cache is not None:
            return [Path(self.cache)]
        own = user_cache("packed")
        if where.startswith(HUB):
            return [own]
        return [(path if path.is_dir() else path.parent) / _BESIDE, own]

    def _say(self, line: str) -> None:
        """Tell a line once, not once a rank."""
        if os.environ.get("RANK", "0") == "0":
            self.tell(line)

    def _pack(
        self, setting: str, where: str, entry: Path, splits: list[str], read: Source | None
    ) -> Path:
        # What packs also lists shards, and few runs pack.
        from mmscale.data.pack import PackSettings, pack_source

        with writing("data.cache", entry.parent):
            entry.mkdir(parents=True, exist_ok=True)
        wait = f"{setting}={where}: another process is packing it into {entry}; waiting for it"
        with _alone(entry, lambda: self._say(wait)):
            if (found := _packed(entry, splits)) is not None:
                return found
            if before := _packed_before(entry, where, self._asked()):
                self._say(
                    f"{setting}={where}: is not what was packed at {before} any more; it is packed "
                    "anew, and that pack stays for whoever reads it"
                )
            data = read or read_source(Path(where), columns=self.columns)
            if self.hold_out and not data.tells_splits:
                data = held_out(data, self.hold_out)
            split = _chosen(setting, where, data, splits)
            about = {
                "source": _identity(where),
                "asked": self._asked(),
                "splits": data.tells_splits or bool(self.hold_out),
            }
            replace_file(entry / _SOURCE, json.dumps(about).encode())
            self.tell(f"{setting}={where}: is packed once, its split {split} into {entry / split}")
            settings = PackSettings(split=split)
            pack_source(
                data,
                entry / split,
                settings,
                workers=min(8, len(os.sched_getaffinity(0))),
                progress=progress_lines("packed", self.tell),
                tell=self.tell,
            )
        return entry / split


def is_source(where: str) -> bool:
    """Whether a place is pairs as they lie and no shards: decided by what is there."""
    if where.startswith(HUB):
        return not where.startswith("hf://")
    if "://" in where or where.startswith("pipe:"):
        return False
    path = Path(where)
    try:
        if path.is_file():
            name = path.name.removesuffix(".gz")
            return name.endswith((*CAPTION_FILES, ".yaml", ".yml"))
        if not path.is_dir() or (path / MANIFEST_NAME).exists() or any(path.glob("*.tar")):
            return False
    except OSError:
        # A brace list may be longer than any path.
        return False
    return is_source_folder(path)


def _identity(where: str) -> str:
    return where if where.startswith(HUB) else str(Path(where).resolve())


def _packed(entry: Path, splits: list[str]) -> Path | None:
    """What was packed whole of the first split that there is; without any told it is `train`."""
    for split in (*splits, "train"):
        if (entry / split / MANIFEST_NAME).is_file():
            told = split in splits or _is_untold(entry)
            return entry / split if told else None
    return None


def _is_untold(entry: Path) -> bool:
    """Whether the source of a pack tells no splits, and `train` is all of it."""
    with suppress(OSError, ValueError):
        return not json.loads((entry / _SOURCE).read_bytes()).get("splits")
    return False


def _packed_before(entry: Path, where: str, asked: list[object]) -> Path | None:
    """A pack of the same source, asked for in the same way, when it was another."""
    for other in sorted(entry.parent.glob(f"*/{_SOURCE}")):
        with suppress(OSError, ValueError):
            told = json.loads(other.read_bytes())
            same = (told.get("source"), told.get("asked")) == (_identity(where), asked)
            if same and other.parent != entry:
                return other.parent
    return None


def _chosen(setting: str, where: str, data: Source, splits: list[str]) -> str:
    """The split of a source that a setting takes."""
    if (split := next((name for name in splits if name in data.splits), None)) is not None:
        return split
    if not data.tells_splits and data.splits == ("train",):
        return "train"
    raise DataError(
        f"{setting}={where}: has no split {' or '.join(splits)}, it has "
        f"{', '.join(data.splits) or 'no pairs'}; name another source, or pack it with "
        "mmscale pack and name the folder of a split"
    )


def _writable(caches: list[Path]) -> Path:
    """The first folder that can be written, else the last, of which it will be told."""
    for cache in caches:
        place = cache
        while not place.exists():
            place = place.parent
        if place.is_dir() and os.access(place, os.W_OK | os.X_OK):
            return cache
    return caches[-1]


@contextmanager
def _alone(entry: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """A block that one process at a time is in; a killed one leaves no claim.

    On a file system without locks nothing holds others back but the pack itself.
    """
    with writing("data.cache", entry):
        file = (entry / ".lock").open("ab")
    with file:
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    waiting()
                told = True
                time.sleep(_POLL_SECONDS)
                continue
            except OSError:
                pass
            break
        try:
            yield
        finally:
            # Not by closing it alone: a decoding process that was forked meanwhile has it too.
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)
