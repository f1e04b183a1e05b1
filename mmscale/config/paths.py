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
# Stores that nothing here reads; a path loses one of two slashes.
_STORE = re.compile(r"(?!https?:)([A-Za-z][A-Za-z0-9+.-]*)://|(s3|gs|gcs|az|abfss?|wasbs?):/")
_KINDS = re.compile(r"(?:(?:hf|timm|openclip|hf-hub|local-dir):)*")
_VARIABLE = re.compile(r"\$(?:\w+|\{[^}]*\}?|\()")
# The kind of error that `explain` tells as it is.
FAULT = "path"


def expanded(text: str) -> str:
    """A path with the home folder in place of `~`, in lists in braces too.

    Raises:
        ValueError: It holds a `~` or `$` that nothing stands for, or is an address of a kind that
            is not read; says which.
    """
    if _ELSEWHERE.match(text):
        return text
    if store := _STORE.match(text):
        raise ValueError(
            f"`{store[1] or store[2]}://` is not read here; give a path on a disk, and for shards "
            "also an http(s) address, or a command with data.allow_pipe=true, such as "
            "'pipe:aws s3 cp s3://BUCKET/a.tar -'"
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


def path_of(text: str, given: str) -> str:
    """What `expanded` gives.

    Args:
        text: As the user wrote it.
        given: What to call it in the message, such as `--out ~/x`.

    Raises:
        ConfigError: As `expanded`.
    """
    try:
        return expanded(text)
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


def expand(value: Any) -> Any:
    """A setting with every path in it expanded; what is no path stays as it is."""
    if isinstance(value, list):
        return [expand(entry) for entry in value]
    if not isinstance(value, str):
        return value
    try:
        return expanded(value)
    except ValueError as error:
        raise PydanticCustomError(
            FAULT, "{given}: {fault}", {"given": value, "fault": str(error)}
        ) from error


def is_path(field: FieldInfo) -> bool:
    """Whether a setting has the type of one path or several."""
    marks = [*field.metadata, *_marks(field.annotation)]
    return any(isinstance(mark, BeforeValidator) and mark.func is expand for mark in marks)


def _marks(annotation: Any) -> list[Any]:
    own = getattr(annotation, "__metadata__", ())
    return [*own, *(mark for inner in get_args(annotation) for mark in _marks(inner))]


PathSetting = Annotated[str, BeforeValidator(expand)]
PathsSetting = Annotated[str | list[str], BeforeValidator(expand)]
