"""Whatever lies elsewhere, read by the kind of its address: the one way in for shards and runs."""

import fnmatch
import re
from collections.abc import Generator
from functools import cached_property

from mmscale.data.buckets import Buckets
from mmscale.data.hub_files import HubFiles
from mmscale.data.remote import BUCKETS, HUB, Store, Web


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

    def names(self, folder: str) -> list[str]:
        """As `Store.names`."""
        return self._store(folder).names(folder)

    def matching(self, pattern: str) -> list[str]:
        """Addresses of the files whose names a pattern matches, sorted; its folder is plain.

        Raises:
            DataError: As `Store.names`.
        """
        folder, _, name = pattern.rpartition("/")
        is_wanted = re.compile(fnmatch.translate(name)).match
        return [f"{folder}/{found}" for found in self.names(folder) if is_wanted(found)]

    def close(self) -> None:
        """Close every connection."""
        for store in ("_web", "_hub", "_buckets"):
            if store in vars(self):
                vars(self)[store].close()
