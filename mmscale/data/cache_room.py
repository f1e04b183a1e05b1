"""Room in a folder of kept files: what was used longest ago goes first."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def make_room(
    folder: Path, pattern: str, limit: float, size: int, may_go: Callable[[Path, float], bool]
) -> bool:
    """Remove files until another fits.

    Args:
        folder: Where they are.
        pattern: Which they are.
        limit: Most bytes of all of them together.
        size: Bytes of the one that shall fit.
        may_go: Whether a file that was last used at this time may be removed.

    Returns:
        Whether it fits.
    """
    files = []
    for path in folder.glob(pattern):
        # Another run may have removed it since.
        with suppress(OSError):
            facts = path.stat()
            files.append((facts.st_mtime, facts.st_size, path))
    total = size + sum(length for _, length, _ in files)
    for used, length, path in sorted(files, key=lambda file: file[0]):
        if total <= limit:
            break
        if may_go(path, used):
            with suppress(OSError):
                path.unlink(missing_ok=True)
                total -= length
    return total <= limit
