"""Decoded training images, shrunk as far as the crops allow, kept for the next epoch and run.

A picture is found by the digest of its encoded bytes, in a folder named by what was done to it, so
that nothing stale is ever met. Each process collects what it decodes and publishes whole segments,
which all processes of all runs map into memory.
"""

import fcntl
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torchvision
from PIL import __version__ as pillow_version
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mmscale.config.data import DataConfig
from mmscale.contracts import InputSpec
from mmscale.data.pixels import REDUCTIONS, KeptPicture, open_picture, resize_whole
from mmscale.outputs import publish, sync

SEGMENT_BYTES = 32 * 2**20
# Changes when the same bytes would be kept as other pixels.
_VERSION = 2
_RESERVE = 2.0
_ABANDONED_SECONDS = 3600


@dataclass(frozen=True)
class Shrinking:
    """What is done to every picture before it is kept.

    Attributes:
        side: Shorter side of larger pictures, pixels; smaller ones stay as they are.
        interpolation: As the transform resamples.
        is_exact: Decode in full, so that the evaluation transform gives the same pixels from the
            kept picture; else JPEGs may be decoded reduced.
        resize: As the evaluation transform resizes (`InputSpec.resize`).
    """

    side: int
    interpolation: str
    is_exact: bool
    resize: str = "shortest"

    @classmethod
    def for_run(cls, data: DataConfig, spec: InputSpec) -> "Shrinking":
        """The smallest pictures whose smallest crops still have as many pixels as the input."""
        if data.augment == "none":
            return cls(spec.image_size, spec.interpolation, True, spec.resize)
        side = math.ceil(spec.image_size / math.sqrt(data.crop_scale[0]))
        return cls(side, spec.interpolation, False)

    def __call__(self, content: bytes, where: str) -> KeptPicture:
        """Decode and shrink.

        Raises:
            DamagedSampleError: The image cannot be decoded.
        """
        picture = open_picture(content, where)
        wanted = min(picture.height, picture.width) / (self.side * _RESERVE)
        part = next((part for part in REDUCTIONS if part <= wanted), 1)
        pixels = picture.pixels(1 if self.is_exact else part)
        if min(pixels.shape[1:]) > self.side:
            pixels = resize_whole(pixels, self.side, self.resize, self.interpolation)
        return KeptPicture(picture.height, picture.width, pixels.permute(1, 2, 0).contiguous())

    @property
    def name(self) -> str:
        """Differs wherever the pixels may."""
        versions = (_VERSION, torchvision.__version__, pillow_version)
        way = [self.side, self.interpolation, self.is_exact, self.resize]
        facts = json.dumps([*way, *versions])
        return hashlib.sha256(facts.encode()).hexdigest()[:16]


class DecodedCache:
    """The pictures that one process finds and adds.

    Args:
        folder: Shared by all; one folder inside it for each way of shrinking.
        shrink: What is done to a picture.
        limit: Most bytes in the folder. What this run has not used gives way, oldest use first;
            where that is not enough, no more is added: what a run reads in turn must not push out
            what it will read next.
    """

    def __init__(self, folder: Path, shrink: Shrinking, limit: float):
        self._root, self._folder = folder, folder / shrink.name
        self._shrink, self._limit = shrink, limit
        self._found: dict[str, tuple[Any, str]] = {}
        self._segments: set[str] = set()
        self._pending: dict[str, KeptPicture] = {}
        self._pending_bytes = 0
        self._is_full = False
        # The clock of a file system may lag behind.
        self._opened = time.time() - 1

    def picture(self, content: bytes, where: str) -> KeptPicture:
        """The picture of an encoded image, kept or decoded now; the same pixels either way.

        Raises:
            DamagedSampleError: It cannot be decoded.
        """
        digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        if found := self._found.get(digest):
            file, name = found
            _, height, width = name.split("-")
            return KeptPicture(int(height), int(width), file.get_tensor(name))
        if pending := self._pending.get(digest):
            return pending
        kept = self._shrink(content, where)
        if not self._is_full:
            self._pending[digest] = kept
            self._pending_bytes += kept.stored.nbytes
            if self._pending_bytes >= SEGMENT_BYTES:
                self._publish()
        return kept

    def renew(self) -> None:
        """Publish what is pending and find what others have published; each epoch begins so."""
        if self._pending:
            self._publish()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            self._is_full = True
            return
        for path in self._folder.glob(".*.part"):
            # What a killed process left; a living one is done with its own in seconds.
            with suppress(OSError):
                if path.stat().st_mtime < self._opened - _ABANDONED_SECONDS:
                    path.unlink()
        for path in sorted(self._folder.glob("*.safetensors")):
            # Its last use, for whoever has to make room.
            with suppress(OSError):
                os.utime(path)
            if path.name not in self._segments:
                self._open(path)

    def _open(self, path: Path) -> None:
        try:
            file = safe_open(path, "pt")
        except (OSError, SafetensorError):
            # Taken away meanwhile, or cut short by a full disk: then it is of no use to anybody.
            path.unlink(missing_ok=True)
            return
        self._segments.add(path.name)
        for name in file.keys():  # noqa: SIM118 - not a mapping
            self._found.setdefault(name.split("-")[0], (file, name))

    def _publish(self) -> None:
        aside = self._folder / f".{os.getpid()}-{time.time_ns()}.part"
        try:
            tensors = {
                f"{digest}-{kept.height}-{kept.width}": kept.stored
                for digest, kept in self._pending.items()
            }
            save_file(tensors, aside)
            sync(aside)
            with self._alone():
                if self._make_room(aside.stat().st_size):
                    path = aside.with_name(f"{aside.name[1:-5]}.safetensors")
                    publish(aside, path)
                    self._open(path)
                else:
                    self._is_full = True
        except (OSError, SafetensorError):
            # A full disk costs the cache, not the run.
            self._is_full = True
        finally:
            aside.unlink(missing_ok=True)
        self._pending, self._pending_bytes = {}, 0

    def _make_room(self, size: int) -> bool:
        """Whether a segment fits, after what was used before this run has gone."""
        return make_room(
            self._root,
            "*/*.safetensors",
            self._limit,
            size,
            lambda path, used: used < self._opened,
        )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time: two that make room at once would both take it."""
        with (self._root / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def make_room(
    folder: Path, pattern: str, limit: float, size: int, may_go: Callable[[Path, float], bool]
) -> bool:
    """Remove files until another fits.

    Args:
        folder: Where they are.
        pattern: Which they are.
        limit: Most bytes of all of them together.
        size: Bytes of the one that shall fit.
        may_go: Whether a file that was last used at this time may be removed.

    Returns:
        Whether it fits.
    """
    files = []
    for path in folder.glob(pattern):
        # Another run may have removed it since.
        with suppress(OSError):
            facts = path.stat()
            files.append((facts.st_mtime, facts.st_size, path))
    total = size + sum(length for _, length, _ in files)
    for used, length, path in sorted(files, key=lambda file: file[0]):
        if total <= limit:
            break
        if may_go(path, used):
            with suppress(OSError):
                path.unlink(missing_ok=True)
                total -= length
    return total <= limit
