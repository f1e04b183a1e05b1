"""Recipes (`shards/*.yaml`): where the parts of a data set lie, where they cannot be guessed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mmscale.errors import DataError


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
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as YAML ({error}); mend the recipe") from error
    known = {"name", "root", "images", "captions", "splits"}
    if not isinstance(content, dict) or not set(content) <= known:
        unknown = sorted(map(str, set(content) - known)) if isinstance(content, dict) else content
        raise DataError(f"{path}: {unknown!r} is not of a recipe; it may have {sorted(known)}")
    for key in ("name", "root"):
        if not isinstance(content.get(key, ""), str):
            raise DataError(f"{path}: {key}={content[key]!r} is not a text; put it in quotes")
    splits = content.get("splits")
    if splits is not None and not isinstance(splits, dict):
        raise DataError(f"{path}: splits={splits!r} is not a table of `split: list file`")
    root = path.parent / Path(content.get("root", ".")).expanduser()
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
        raise DataError(f"{recipe}: {key}={value!r} is neither a path nor a list of paths")
    return tuple(values)
