"""What cannot be used of a data set: how it is told, and how much of it is taken for a mistake.

What image libraries complain about is told with the name of the image that it is about.
"""

import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import UnidentifiedImageError

from mmscale.errors import printable

# Above this share something is wrong with all of them, unless they are a handful.
MOST_LEFT_OUT = 0.5
_HANDFUL = 8
# `decode_jpeg, /build/csrc/decode_jpeg.cpp:171, ` in front of what torchvision has to say.
_PLACE_IN_SOURCE = re.compile(r"^\w+, \S+\.\w+:\d+, ")
_OBJECT = re.compile(r"\s*<[^<>]* at 0x[0-9a-fA-F]+>")
# What else is warned of is for programmers.
_OF_IMAGES = (UserWarning, RuntimeWarning)
_told: set[str] = set()


class DamagedSampleError(Exception):
    """A sample that cannot be used; the stream puts another in its place."""


class DamagedShardError(Exception):
    """A file that cannot be walked as a tar to its end.

    Args:
        fault: What is wrong with it.
        repair: What to do.
    """

    def __init__(self, fault: str, repair: str = "fetch or pack the shard again"):
        super().__init__(fault)
        self.repair = repair


def are_too_many(left_out: int, total: int, most: float) -> bool:
    """Whether so many of `total` may not be left out without a word of the user."""
    return left_out >= _HANDFUL and left_out > most * total


def reason_of(error: Exception) -> str:
    """What a decoder raised, in one line without places in its source and Python objects."""
    if isinstance(error, UnidentifiedImageError):
        return "not a JPEG, PNG or WebP image"
    text = _OBJECT.sub("", _PLACE_IN_SOURCE.sub("", str(error)))
    return text.splitlines()[0] if text.strip() else type(error).__name__


@contextmanager
def warnings_named(where: str) -> Iterator[None]:
    """Tell a library's warnings on stderr with the name of the image, each kind once a process."""
    with warnings.catch_warnings(record=True) as caught:
        for category in _OF_IMAGES:
            warnings.simplefilter("always", category)
        yield
    for warning in caught:
        if not issubclass(warning.category, _OF_IMAGES):
            warnings.showwarning(
                warning.message, warning.category, warning.filename, warning.lineno
            )
            continue
        text = " ".join(str(warning.message).split())
        tell_once(re.sub(r"\d+", "0", text), f"{where}: {text}")


def tell_once(kind: str, line: str) -> None:
    """Write a line to stderr unless this process has written one of its kind."""
    if kind not in _told:
        _told.add(kind)
        told = f"mmscale: {line} (told once; there may be others like it)\n"
        sys.stderr.write(printable(told))
