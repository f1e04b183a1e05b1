"""The tars that the words of a command name, on this machine or elsewhere."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

from mmscale.data.far import Far
from mmscale.data.remote import is_pipe, is_remote, is_web
from mmscale.data.shards import list_shards
from mmscale.errors import ConfigError


def named_tars(words: Sequence[str]) -> list[Path | str]:
    """The tars that words name: files, addresses, folders, globs or brace lists of either.

    Raises:
        ConfigError: A word is a command.
        DataError: A word matches nothing, or the store does not tell what it holds.
    """
    found: list[Path | str] = []
    for word in words:
        if is_pipe(word):
            raise ConfigError(f"{word}: is a command; name the tars, or the folder that holds them")
        if is_remote(word):
            if is_web(word) and not urlsplit(word).path.endswith((".tar", "}")):
                with closing(Far()) as far:
                    far.entries(word)
            found += list_shards("SHARDS", word).paths
            continue
        path = Path(word)
        # A name may hold what means something in a pattern.
        if path.exists() and (path.suffix == ".tar" or not path.is_dir()):
            found.append(path)
        else:
            found += list_shards("SHARDS", word).paths
    return found
