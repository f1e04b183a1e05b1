"""YAML as its 1.2 core schema reads it: `3e-4` is a number, `off` and `no` are text.

PyYAML follows YAML 1.1, where `lr: 3e-4` is text and `wandb: off` is false; a key given twice,
which PyYAML lets the later value win silently, is refused.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from mmscale.errors import ConfigError


class _CoreLoader(yaml.SafeLoader):
    """Safe loader with the 1.2 core scalars."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - the base class declares it so

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
):
    _CoreLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first
    )


def parse_scalar(text: str) -> Any:
    """The value of one `key=value` word; text that is not YAML stays text."""
    try:
        return yaml.load(text, Loader=_CoreLoader)
    except yaml.YAMLError:
        return text


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        ConfigError: Not readable, not YAML, or not a mapping.
    """
    try:
        content = yaml.load(path.read_text("utf-8"), Loader=_CoreLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); name a readable YAML file") from error
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" line {where.line + 1}" if where else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise ConfigError(f"{path}{line}: {problem}; mend the file") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: is nested too deep to be read; mend the file") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: holds {type(content).__name__}, must hold settings as key: value"
        )
    return content


def as_yaml(settings: dict[str, Any]) -> str:
    """Settings as `read_yaml` reads them back."""
    return str(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
