"""The type of every setting and option that names a path: `~` is the home folder, `$` is refused.

Bash leaves both alone in `run.dir=~/runs`, and a folder that is really named `~` is a danger to who
removes it.
"""

import re
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BeforeValidator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from mmscale.errors import ConfigError

# What these begin with is no path here: an address, or a command of a shell.
_ELSEWHERE = re.compile(r"https?://|pipe:")
# Stores; a path loses one of two slashes.
_STORE = re.compile(r"(?!https?:)([A-Za-z][A-Za-z0-9+.-]*)://|(s3|gs|gcs|az|abfss?|wasbs?):/(?!/)")
# Those that shards are read from.
_READ = re.compile(r"(?:s3|gs|az)://|hf://datasets/")
_BUCKET = re.compile(r"(?:s3|gs|az)://[^/\s{}*?]+(?:/[^/\s{}*?]+)*/?")
_KINDS = re.compile(r"(?:(?:hf|timm|openclip|hf-hub|local-dir):)*")
_VARIABLE = re.compile(r"\$(?:\w+|\{[^}]*\}?|\()")
# The kind of error that `explain` tells as it is.
FAULT = "path"


def expanded(text: str, *, far: bool = False) -> str:
    """A path with the home folder in place of `~`, in lists in braces too.

    Args:
        text: As the user wrote it.
        far: An address in a bucket or of a data set of the hub may stand in its place.

    Raises:
        ValueError: It is empty, holds a `~` or `$` that nothing stands for, or is an address of a
            kind that is not read; says which.
    """
    if not text.strip():
        raise ValueError("an empty text names nothing; write a path, or leave it out")
    if _ELSEWHERE.match(text) or (far and _READ.match(text)):
        return text
    if store := _STORE.match(text):
        scheme = f"{store[1] or store[2]}://"
        if not far and _READ.match(text):
            raise ValueError(f"`{scheme}` is not read here but for shards; give a path on a disk")
        raise ValueError(
            f"`{scheme}` is not read here; give a path on a disk, and for shards also an address "
            "that begins with https://, s3://, gs://, az:// or hf://datasets/, or a command with "
            "data.allow_pipe=true"
        )
    kinds = _KINDS.match(text)
    start = kinds.end() if kinds else 0
    path = _with_home(text[start:])
    if variable := _VARIABLE.search(path):
        raise ValueError(
            f"`{variable[0]}` is not filled in here, and would be the name of a folder; write the "
            "path out"
        )
    if "~" in re.split(r"[/{},]", path):
        raise ValueError("`~` is the home folder at the beginning only; write the path out")
    return text[:start] + path


def path_of(text: str, given: str, *, far: bool = False) -> str:
    """What `expanded` gives.

    Args:
        text: As the user wrote it.
        given: What to call it in the message, such as `--out ~/x`.
        far: As `expanded`.

    Raises:
        ConfigError: As `expanded`.
    """
    try:
        return expanded(text, far=far)
    except ValueError as error:
        raise ConfigError(f"{given}: {error}") from error


def _with_home(path: str) -> str:
    if path.startswith("~"):
        first, slash, rest = path.partition("/")
        return _home(first) + slash + rest
    if path.startswith("{"):
        # {~/a,~/b}/x.tar, as a shell would read it.
        listed, brace, rest = path.partition("}")
        return re.sub(r"(?<=[{,])~[^/,{}]*", lambda found: _home(found[0]), listed) + brace + rest
    return path


def _home(name: str) -> str:
    try:
        return str(Path(name).expanduser())
    except RuntimeError as error:
        whose = "HOME is not set" if name == "~" else f"no user is named {name[1:]}"
        raise ValueError(f"`{name}` is no home folder ({whose}); write the path out") from error


def expand(value: Any, *, far: bool = False) -> Any:
    """A setting with every path in it expanded; what is no path stays as it is."""
    if isinstance(value, list):
        return [expand(entry, far=far) for entry in value]
    if not isinstance(value, str):
        return value
    try:
        return expanded(value, far=far)
    except ValueError as error:
        raise PydanticCustomError(
            FAULT, "{given}: {fault}", {"given": value, "fault": str(error)}
        ) from error


def expand_places(value: Any) -> Any:
    """As `expand`, where addresses may stand in the place of paths."""
    return expand(value, far=True)


def is_path(field: FieldInfo) -> bool:
    """Whether a setting has the type of one path or several."""
    marks = [*field.metadata, *_marks(field.annotation)]
    return any(
        isinstance(mark, BeforeValidator) and mark.func in (expand, expand_places) for mark in marks
    )


def _marks(annotation: Any) -> list[Any]:
    own = getattr(annotation, "__metadata__", ())
    return [*own, *(mark for inner in get_args(annotation) for mark in _marks(inner))]


def bucket(value: Any) -> Any:
    """The address of a folder in a bucket, as a setting names it."""
    if isinstance(value, str) and not _BUCKET.fullmatch(value):
        fault = "is no folder of a bucket; write s3://BUCKET/FOLDER, gs://... or az://..."
        raise PydanticCustomError(FAULT, "{given}: {fault}", {"given": value, "fault": fault})
    return value.rstrip("/") if isinstance(value, str) else value


BucketSetting = Annotated[str, BeforeValidator(bucket)]
PathSetting = Annotated[str, BeforeValidator(expand)]
PlaceSetting = Annotated[str, BeforeValidator(expand_places)]
PlacesSetting = Annotated[str | list[str], BeforeValidator(expand_places)]
