"""Whatever lies elsewhere, read by the kind of its address: the one way in for shards and runs."""

import fnmatch
import hashlib
import re
import tempfile
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO

from mmscale.data.buckets import Buckets
from mmscale.data.damage import DamagedShardError
from mmscale.data.hub_files import HubFiles
from mmscale.data.manifest import (
    MANIFEST_NAME,
    Manifest,
    joined,
    parse_manifest,
    read_manifest,
    write_manifest,
    written,
)
from mmscale.data.remote import BUCKETS, HUB, Entries, NotThereError, Store, Web, beside, safe_url
from mmscale.errors import DataError
from mmscale.outputs import user_cache


class Far:
    """Stores by kind, each opened when it is first read. May be used by several threads."""

    @cached_property
    def _web(self) -> Store:
        return Web()

    @cached_property
    def _hub(self) -> Store:
        return HubFiles()

    @cached_property
    def _buckets(self) -> Store:
        return Buckets()

    def _store(self, url: str) -> Store:
        if url.startswith(BUCKETS):
            return self._buckets
        return self._hub if url.startswith(HUB) else self._web

    def has_ranges(self, url: str) -> bool:
        """As `Store.has_ranges`."""
        return self._store(url).has_ranges(url)

    def opening(self, url: str) -> tuple[bytes, int | None]:
        """As `Store.opening`."""
        return self._store(url).opening(url)

    def chunks(
        self, url: str, start: int = 0, end: int | None = None, size: int | None = None
    ) -> Generator[bytes, None, None]:
        """As `Store.chunks`."""
        return self._store(url).chunks(url, start, end, size)

    def entries(self, folder: str) -> Entries:
        """As `Store.entries`."""
        return self._store(folder).entries(folder)

    def put(self, url: str, content: bytes) -> None:
        """As `Store.put`."""
        self._store(url).put(url, content)

    def matching(self, pattern: str) -> list[str]:
        """Addresses of the files whose names a pattern matches, sorted; its folder is plain.

        Raises:
            DataError: As `Store.entries`.
        """
        folder, _, name = pattern.rpartition("/")
        is_wanted = re.compile(fnmatch.translate(name)).match
        return [
            f"{folder}/{found}" for found in sorted(self.entries(folder).files) if is_wanted(found)
        ]

    def close(self) -> None:
        """Close every connection."""
        for store in ("_web", "_hub", "_buckets"):
            if store in vars(self):
                vars(self)[store].close()


@contextmanager
def at_hand(place: Path | str) -> Iterator[IO[bytes]]:
    """What lies at a place, to be read to and fro: the file, or a nameless copy for the while.

    Raises:
        DamagedShardError: It is no file.
        DataError: It cannot be fetched, or there is no room for it.
    """
    if isinstance(place, Path):
        if not place.is_file():
            # A pipe in its place would never be opened.
            raise DamagedShardError("is missing, or not a file")
        with place.open("rb") as file:
            yield file
        return
    with tempfile.TemporaryFile() as copy:
        with closing(Far()) as far, closing(far.chunks(place)) as chunks:
            keep(chunks, copy)
        yield copy


def keep(chunks: Iterable[bytes], file: IO[bytes], most: int | None = None) -> int:
    """Write bytes that come into a file, to its end or until there are more than `most`.

    Returns:
        How many came.

    Raises:
        DataError: There is no room for them.
    """
    count = 0
    try:
        for chunk in chunks:
            count += len(chunk)
            if most is not None and count > most:
                break
            file.write(chunk)
        file.flush()
    except OSError as error:
        raise DataError(
            f"{tempfile.gettempdir()}: cannot keep the bytes of a shard ({error.strerror}); "
            "free space there, or let TMPDIR name a folder with more"
        ) from error
    return count


def manifest_at(folder: Path | str, far: Far | None = None, *, lazily: bool = False) -> Manifest:
    """The manifest of a folder, wherever that is: beside its shards, or as `put_manifest` kept it.

    Raises:
        DataError: There is none, it cannot be fetched, or it contradicts itself.
    """
    if isinstance(folder, Path):
        return read_manifest(folder, lazily=lazily)
    where = str(beside(folder, MANIFEST_NAME))
    try:
        with closing((far or Far()).chunks(where)) as chunks:
            content = joined(safe_url(where), chunks)
    except NotThereError:
        if not (kept := kept_here(folder) / MANIFEST_NAME).exists():
            raise
        return read_manifest(kept.parent, lazily=lazily)
    return parse_manifest(safe_url(where), content, lazily=lazily)


def put_manifest(folder: Path | str, manifest: Manifest) -> str | None:
    """Write a folder's manifest where it belongs.

    Returns:
        Where it is kept instead, and why, if the folder lies elsewhere and takes none.
    """
    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)
        write_manifest(folder, manifest)
        return None
    try:
        with closing(Far()) as far:
            far.put(str(beside(folder, MANIFEST_NAME)), written(manifest))
    except DataError as error:
        here = kept_here(folder)
        here.mkdir(parents=True, exist_ok=True)
        write_manifest(here, manifest)
        return (
            f"{error}: its manifest is kept in {here}, where it is found on this machine; put "
            f"{MANIFEST_NAME} beside the shards for others"
        )
    return None


def kept_here(folder: str) -> Path:
    """Where the manifest of a folder elsewhere is kept that takes none itself."""
    # Without a signature that a query may hold: the next one is another.
    name = hashlib.sha256(safe_url(folder).rstrip("/").encode()).hexdigest()[:32]
    return user_cache("manifests") / name
