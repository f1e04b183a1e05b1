"""Recipes (`shards/*.yaml`): where the parts of a data set lie, where they cannot be guessed."""

import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmscale.config.load import read_yaml
from mmscale.config.paths import path_of
from mmscale.errors import ConfigError, DataError


@dataclass(frozen=True)
class Recipe:
    """Where the parts of a data set lie; None: look for them."""

    root: Path
    name: str | None = None
    images: tuple[str, ...] | None = None
    captions: tuple[str, ...] | None = None
    splits: dict[str, tuple[str, ...]] | None = None


def read_recipe(path: Path) -> Recipe:
    """Read a recipe, as untrusted data.

    Raises:
        DataError: A key it may not have, a value of another type, or no folder at its root.
    """
    try:
        content = read_yaml(path)
    except ConfigError as error:
        raise DataError(str(error)) from error
    known = {"name", "root", "images", "captions", "splits"}
    if unknown := sorted(map(str, set(content) - known)):
        raise DataError(f"{path}: {unknown} is not of a recipe; it may have {sorted(known)}")
    for key in ("name", "root"):
        if not isinstance(content.get(key, ""), str):
            raise DataError(f"{path}: {key}={_shown(content[key])} is not a text; put it in quotes")
    splits = content.get("splits")
    if splits is not None and not isinstance(splits, dict):
        raise DataError(f"{path}: splits={_shown(splits)} is not a table of `split: list file`")
    try:
        root = path.parent / path_of(content.get("root", "."), f"{path}: root")
    except ConfigError as error:
        raise DataError(str(error)) from error
    if not root.is_dir():
        raise DataError(
            f"{path}: its root {root} is no folder; unpack the data there or change root"
        )
    return Recipe(
        root,
        content.get("name"),
        _paths(path, "images", content.get("images")),
        _paths(path, "captions", content.get("captions")),
        splits
        and {str(name): _paths(path, "splits", files) or () for name, files in splits.items()},
    )


def _paths(recipe: Path, key: str, value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise DataError(f"{recipe}: {key}={_shown(value)} is neither a path nor a list of paths")
    return tuple(values)


def _shown(value: Any) -> str:
    """A value in few words: aliases let a short file hold an endless one."""
    return reprlib.repr(value)
