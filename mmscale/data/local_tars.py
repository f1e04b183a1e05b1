"""The tars of this machine that the words of a command name."""

from collections.abc import Sequence
from pathlib import Path

from mmscale.data.remote import is_remote
from mmscale.data.shards import list_shards
from mmscale.errors import ConfigError


def local_tars(words: Sequence[str]) -> list[Path]:
    """The tars of this machine that words name: files, folders, globs or brace lists.

    Raises:
        ConfigError: A word is an address or a command.
        DataError: A word matches nothing.
    """
    found: list[Path] = []
    for word in words:
        if is_remote(word):
            raise ConfigError(
                f"{word}: is not on this machine; fetch the shards and index them here"
            )
        path = Path(word)
        # A name may hold what means something in a pattern.
        if path.exists() and (path.suffix == ".tar" or not path.is_dir()):
            found.append(path)
        else:
            found += map(Path, list_shards("SHARDS", word).paths)
    return found
