"""Encoded images in cells of Parquet and Arrow files, read where they lie."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmscale.errors import ConfigError, DataError

# Rows of encoded images that are in memory at a time.
_ROWS = 32


@dataclass(frozen=True)
class ImageCell:
    """An encoded image in a table.

    Attributes:
        file: Parquet, or a stream of Arrow's.
        group: Row group of Parquet; 0 otherwise.
        row: In the group.
        column: Of bytes, or of the Hub's `{bytes, path}`.
        name: What the image is called.
        size: Its bytes.
        digest: Their sha256.
    """

    file: Path
    group: int
    row: int
    column: str
    name: str
    size: int
    digest: bytes

    def read(self) -> bytes:
        """The encoded image.

        Raises:
            OSError: The file cannot be read.
        """
        content = _reader(self.file, self.group, self.column).at(self.row)
        if content is None or hashlib.sha256(content).digest() != self.digest:
            raise OSError(None, "the table was changed while it was packed", str(self.file))
        return content


def needs(what: object, package: str) -> Any:
    """A package of the extra `datasets`.

    Raises:
        ConfigError: It is not installed.
    """
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"{what}: needs {package.partition('.')[0]}, which is not installed; run "
            "pip install 'mmscale[datasets]'"
        ) from error


def parquet_file(file: Path) -> Any:
    """A Parquet file that is read page by page.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: It is none.
    """
    parquet, arrow = needs(file, "pyarrow.parquet"), needs(file, "pyarrow")
    try:
        # Else a whole row group is read ahead, which may be all of the file.
        return parquet.ParquetFile(file, memory_map=True, pre_buffer=False)
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: cannot be read as Parquet ({error}); write it again") from error


def arrow_table(file: Path) -> Any:
    """A stream of Arrow's, of which only what is looked at comes into memory."""
    arrow = needs(file, "pyarrow")
    try:
        return arrow.ipc.open_stream(arrow.memory_map(str(file))).read_all()
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: cannot be read as Arrow ({error}); write it again") from error


def content_of(value: Any) -> bytes | None:
    """The bytes of a cell; None where it has none, but a path at most."""
    if isinstance(value, dict):
        value = value.get("bytes")
    return value if isinstance(value, bytes) and value else None


@lru_cache(maxsize=2)
def _reader(file: Path, group: int, column: str) -> "_Reader":
    return _Reader(file, group, column)


class _Reader:
    """One column of one group; rows that are asked for in their order are read once."""

    def __init__(self, file: Path, group: int, column: str):
        self._file, self._group, self._column = file, group, column
        self._table = None if file.suffix == ".parquet" else arrow_table(file).column(column)
        self._start, self._held = 0, []  # type: tuple[int, list[Any]]
        self._batches: Iterator[Any] = iter(())
        self._restart()

    def _restart(self) -> None:
        self._start, self._held = 0, []
        if self._table is None:
            self._batches = parquet_file(self._file).iter_batches(
                _ROWS, [self._group], [self._column], use_threads=False
            )

    def at(self, row: int) -> bytes | None:
        if self._table is not None:
            return content_of(self._table[row].as_py())
        if row < self._start:
            self._restart()
        while row >= self._start + len(self._held):
            self._start += len(self._held)
            batch = next(self._batches, None)
            if batch is None:
                return None
            self._held = batch.column(0)
        return content_of(self._held[row - self._start].as_py())


def rows_of_parquet(file: Path, columns: list[str]) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Group, row in it, and fields of every row."""
    table = parquet_file(file)
    for group in range(table.num_row_groups):
        row = 0
        for batch in table.iter_batches(_ROWS, [group], columns, use_threads=False):
            for fields in batch.to_pylist():
                yield group, row, fields
                row += 1


def rows_of_arrow(file: Path, columns: list[str]) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """As `rows_of_parquet`, of a stream of Arrow's: one group."""
    row = 0
    for batch in arrow_table(file).select(columns).to_batches(_ROWS):
        for fields in batch.to_pylist():
            yield 0, row, fields
            row += 1
