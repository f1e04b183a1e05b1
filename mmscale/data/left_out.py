"""How much of a data set may be useless before that is taken for a mistake."""

from collections.abc import Sequence

from mmscale.data.sources import Record
from mmscale.errors import DataError

# Above this share something is wrong with all of them, unless they are a handful.
MOST_LEFT_OUT = 0.5
_HANDFUL = 8


def are_too_many(left_out: int, total: int, most: float) -> bool:
    """Whether so many of `total` may not be left out without a word of the user."""
    return left_out >= _HANDFUL and left_out > most * total


def require_few(where: object, left_out: int, total: int, most: float) -> None:
    """Refuse to go on where too many images cannot be used.

    Raises:
        DataError: They are too many.
    """
    if are_too_many(left_out, total, most):
        raise DataError(
            f"{where}: {left_out:,} of {total:,} images were rejected, more than --max-left-out "
            f"{most:g} allows; rejected.txt there says why, --max-left-out 1 goes on with the rest"
        )


def require_images(records: Sequence[Record], most: float) -> None:
    """Refuse a data set of which too many image files are not there, before anything is packed.

    Raises:
        DataError: They are too many.
    """
    missing = [record for record in records if not _is_file(record)]
    if are_too_many(len(missing), len(records), most):
        first = missing[0]
        raise DataError(
            f"{first.image.parent}: {len(missing):,} of {len(records):,} images of {first.split} "
            f"are missing, first {first.image.name}, more than --max-left-out {most:g} allows; put "
            "them there, name their folder with --images, or pack the rest with --max-left-out 1"
        )


def _is_file(record: Record) -> bool:
    try:
        return record.image.is_file()
    except OSError:
        return False
