"""Write docs/settings.md, the table of every setting, from the schema.

python tools/write_settings.py
"""

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mmscale.config.schema import Config
from mmscale.config.values import Duration, Ramp

PAGE = Path(__file__).resolve().parents[1] / "docs" / "settings.md"
INTRODUCTION = """\
# Every setting

Written by `tools/write_settings.py` from `mmscale/config/schema.py`; a test fails when it is out of
date. A setting is an entry of a YAML file (`train: {duration: 5 epochs}`) or a word of a command
(`train.duration="5 epochs"`). Where two of them say different things, the later one wins.
A *duration* is a number with its unit: `300 steps`, `5 epochs`, `1M samples`. A path with `[]` is
a setting of each entry of a list, one with `[name]` of each entry whose `kind` is that name, one
with `NAME` of each entry of a mapping. A *ramp* is a number, or `{from: 0, to: 1, over: 1 epochs}`,
with `start: DURATION` if it is to wait.
"""
NAMES = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true, false",
    Duration: "duration",
    Ramp: "ramp",
}
BOUNDS = {Gt: (">", "gt"), Ge: (">=", "ge"), Lt: ("<", "lt"), Le: ("<=", "le")}


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for name, field in Config.model_fields.items():
        rows = "\n".join(
            f"| `{path}` | {kind(setting)} | {default(setting)} | {described(setting)} |"
            for path, setting in group(name, field.annotation)
        )
        doc = field.annotation.__doc__ if is_section(field.annotation) else field.description
        parts.append(
            f"## {name}\n\n{doc}\n\n"
            f"| setting | type | default | meaning |\n|---|---|---|---|\n{rows}\n"
        )
    return "\n".join(parts)


def group(name: str, annotation: Any) -> Iterator[tuple[str, FieldInfo]]:
    """The settings of one group: a section, or a list of sections."""
    if is_section(annotation):
        yield from settings(annotation, f"{name}.")
    for entry in entries(annotation):
        yield from settings(entry, f"{name}[].")


def settings(section: Any, prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    """Dotted path and field of every leaf; an entry of a list is written `list[].name`.

    One of a mapping is written `mapping.NAME.name`.
    """
    for name, field in section.model_fields.items():
        if is_section(field.annotation):
            yield from settings(field.annotation, f"{prefix}{name}.")
            continue
        yield prefix + name, field
        is_named = get_origin(field.annotation) is dict
        for entry in entries(field.annotation):
            place = ".NAME" if is_named else f"[{tag(entry)}]"
            yield from settings(entry, f"{prefix}{name}{place}.")


def entries(annotation: Any) -> list[Any]:
    """Sections that a list may hold."""
    found = []
    for part in get_args(annotation):
        found += [part] if is_section(part) else entries(part)
    return found


def tag(section: Any) -> str:
    """The `kind` that tells an entry from others; nothing where they are all of one."""
    field = section.model_fields.get("kind")
    choices = get_args(field.annotation) if field else ()
    return choices[0] if len(choices) == 1 else ""


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def kind(field: FieldInfo) -> str:
    return type_name(field.annotation) + bounds(field.metadata)


def type_name(annotation: Any) -> str:
    """A type in words."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_name(inner[0]) + bounds(inner[1:])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(arg) for arg in inner)
    if origin is list or (origin is tuple and inner[-1] is Ellipsis):
        return "list of mappings" if entries(annotation) else f"list of {type_name(inner[0])}"
    if origin is tuple:
        return f"list of {len(inner)} {type_name(inner[0])}s"
    if origin is dict:
        return "mapping"
    if annotation is type(None):
        return "null"
    if is_section(annotation):
        return "mapping"
    return NAMES[annotation]


def bounds(metadata: Any) -> str:
    """Limits of a number, such as ` >= 0, <= 1`."""
    marks = [item for entry in metadata for item in getattr(entry, "metadata", [entry])]
    limits = [
        f"{BOUNDS[type(mark)][0]} {getattr(mark, BOUNDS[type(mark)][1])}"
        for mark in marks
        if type(mark) in BOUNDS
    ]
    return " " + ", ".join(limits) if limits else ""


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be set"
    value = field.get_default(call_default_factory=True)
    return f"`{written(value)}`"


def written(value: Any) -> str:
    """A value as it stands in YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, BaseModel):
        pairs = (f"{name}: {written(getattr(value, name))}" for name in type(value).model_fields)
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(written(item) for item in value) + "]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def described(field: FieldInfo) -> str:
    return (field.description or "").replace("\n", " ").replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
