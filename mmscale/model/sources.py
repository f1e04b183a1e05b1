"""Where a tower comes from (`timm:NAME`, `hf:NAME_OR_PATH`, `openclip:NAME`), and wrong options."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

from mmscale.config.model import TowerConfig
from mmscale.errors import ConfigError

FORMS = "`timm:NAME`, `hf:NAME_OR_PATH` or `openclip:NAME`"


def parse_source(config: TowerConfig, key: str, known: Iterable[str]) -> tuple[str, str]:
    """Split a tower's name into its source and the name there.

    Args:
        config: The tower's settings.
        key: Where they stand, such as `model.vision`.
        known: Sources that can build this tower.

    Raises:
        ConfigError: There is no name, or its source is unknown.
    """
    if not config.name:
        raise ConfigError(
            f"{key}.name is not set: give it a tower ({FORMS}), or set model.preset to small, "
            f"medium, large or openclip:NAME."
        )
    source, _, name = config.name.partition(":")
    if source not in known or not name:
        raise ConfigError(
            f"{key}.name={config.name} does not say where the tower comes from: write one of "
            f"{', '.join(f'{word}:NAME' for word in known)}."
        )
    return source, name


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A closing hint for an unknown name; empty where nothing is near."""
    near = get_close_matches(word, list(known), n=3)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def check_options(options: Mapping[str, Any], known: Iterable[str], key: str, owner: str) -> None:
    """Refuse the first option that `owner` does not have."""
    known = sorted(known)
    for option in options:
        if option not in known:
            raise ConfigError(
                f"{key}.options.{option} is not an option of {owner}{did_you_mean(option, known)}; "
                f"remove it."
            )


@contextmanager
def constructing(key: str, owner: str) -> Iterator[None]:
    """Tell a library's refusal of its constructor options as the setting that caused it."""
    try:
        yield
    except (
        TypeError,
        ValueError,
        AssertionError,
        RuntimeError,
        LookupError,
        AttributeError,
        ImportError,
    ) as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        unknown = re.search(r"unexpected keyword argument '(\w+)'", reason)
        if unknown:
            raise ConfigError(
                f"{key}.options.{unknown[1]} is not an option of {owner}; remove it."
            ) from error
        raise ConfigError(
            f"{owner} cannot be built with {key}.options as they are: {reason[:300]}; change them."
        ) from error
