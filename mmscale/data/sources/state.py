"""Whether a source is what it was: a digest that reads captions, and of images only their dates."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mmscale.config.data import ColumnsConfig
from mmscale.data.sources.cells import ImageCell, needs, parquet_file
from mmscale.data.sources.columns import choose_columns
from mmscale.data.sources.layouts import is_known_folder
from mmscale.data.sources.read import read_source
from mmscale.data.sources.records import Source
from mmscale.data.sources.typed import HUB, encoded_in, hub_parts, is_saved, parquet_in
from mmscale.errors import DataError, gist


@dataclass(frozen=True)
class State:
    """What a source is now.

    Attributes:
        digest: Changes when its captions, or the name, size or date of an image, do.
        source: What it holds, if that had to be read for it.
    """

    digest: str
    source: Source | None = None


def state_of(path: Path, columns: ColumnsConfig | None) -> State:
    """What a source is now; of tables that hold the images only the files' sizes and dates.

    Raises:
        ConfigError: A package is not installed.
        DataError: The source cannot be read.
    """
    if str(path).startswith(HUB):
        name, config, revision = hub_parts(str(path))
        if not Path(name).is_dir():
            return State(_sha256([name, str(config), _commit(str(path), name, revision)]))
        return State(_sha256(_facts(_files_below(Path(name)))))
    if (files := _whole_tables(path, columns)) is not None:
        return State(_sha256(_facts(files)))
    data = read_source(path, columns=columns)
    lines = []
    for record in data.records:
        fields = (record.key, record.split, record.captions, record.label, record.group)
        lines.append(f"{fields!r} {_fact(record.image)}")
    lines += [f"{one.key} {one.reason} {one.split}" for one in data.rejected]
    return State(_sha256(lines), data)


def _whole_tables(path: Path, columns: ColumnsConfig | None) -> list[Path] | None:
    """The files of a source that holds its images itself; None for any other."""
    if path.is_dir():
        if is_known_folder(path):
            return None
        if is_saved(path):
            return _files_below(path)
        files = parquet_in(path)
    else:
        files = [path] if path.suffix == ".parquet" else []
    for file in files:
        schema = parquet_file(file).schema_arrow
        encoded = encoded_in(schema)
        if choose_columns(file, schema.names, columns, encoded).image not in encoded:
            return None
    return files or None


def _commit(address: str, name: str, revision: str | None) -> str:
    """The commit that a data set of the Hub is at."""
    hub = needs(address, "huggingface_hub")
    try:
        return str(hub.HfApi().dataset_info(name, revision=revision).sha)
    except Exception as error:
        raise DataError(
            f"{address}: the Hub does not tell its commit ({gist(error)}); check its name and "
            "HF_TOKEN; where there is no network, pack it beforehand with mmscale pack"
        ) from error


def _files_below(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _facts(files: Iterable[Path]) -> list[str]:
    return [f"{file} {_fact(file)}" for file in files]


def _fact(image: Path | ImageCell) -> str:
    if isinstance(image, ImageCell):
        return f"{image.name} {image.digest.hex()}"
    try:
        found = os.stat(image)  # noqa: PTH116 - a million of them
    except OSError:
        return f"{image} none"
    return f"{image} {found.st_size} {found.st_mtime_ns}"


def _sha256(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode(errors="surrogatepass") + b"\n")
    return digest.hexdigest()
