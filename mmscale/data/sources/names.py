"""File names of images, and the keys that shards call them by."""

import re
from pathlib import Path

PICTURE = re.compile(r".+\.(?:jpe?g|png|webp)", re.IGNORECASE)


def stem_of(name: str) -> str:
    """The name without the ending of an image: split lists leave it out as they like."""
    return re.sub(r"\.(?:jpe?g|png|webp)$", "", name, flags=re.IGNORECASE)


def key_of(name: str) -> str:
    """What an image is called in a shard."""
    # Readers split at the first dot, lists at blanks.
    return re.sub(r"[./\\\s\x00-\x1f\x7f\ud800-\udfff]", "_", stem_of(name))


def is_inside(name: str) -> bool:
    """Whether a file name stays in its folder."""
    return (
        bool(name)
        and "\0" not in name
        and not Path(name).is_absolute()
        and ".." not in Path(name).parts
    )
