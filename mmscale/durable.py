"""Files that appear whole or not at all: written aside, synced to disk, renamed."""

import os
from contextlib import suppress
from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """Give a file its content in one step that survives a kill and a power cut."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        publish(aside, path)
    except OSError as error:
        # A full disk does not say which file it was.
        error.filename, error.filename2 = str(path), None
        with suppress(OSError):
            aside.unlink()
        raise


def publish(aside: Path, path: Path) -> None:
    """Move a finished file or folder, already on disk, to its name."""
    aside.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
