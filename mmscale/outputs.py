"""What a command writes: checked before its work begins, whole or not at all; faults tell where."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmscale.errors import ConfigError, storage_fault


@contextmanager
def writing(name: str, path: Path) -> Iterator[None]:
    """Lines that write what a setting (`run.dir`) or an option (`--out`) names.

    Args:
        name: Of the setting or option; empty where the path says what it is.
        path: Its value.

    Raises:
        ConfigError: The path, its permissions or the disk do not allow it.
    """
    try:
        yield
    except Exception as error:
        if (fault := storage_fault(error)) is None:
            raise
        is_setting = name and not name.startswith("-")
        given = f"{name}={path}" if is_setting else f"{name} {path}".strip()
        raise ConfigError(f"{given}: cannot be written: {fault}") from error


def require_file(name: str, path: Path) -> None:
    """Refuse a place where a file cannot be written; leaves nothing behind.

    Raises:
        ConfigError: Says why.
    """
    with writing(name, path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if _is_ordinary(path):
            _probe(Path(os.path.realpath(path)).parent)


def require_folder(name: str, path: Path) -> None:
    """Refuse a place where a folder cannot be filled; leaves nothing behind.

    Raises:
        ConfigError: Says why.
    """
    with writing(name, path):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        _probe(Path(os.path.realpath(path)))


@contextmanager
def file_output(name: str, path: Path) -> Iterator[Path]:
    """Where to write a file that appears whole or not at all, with the folders above it.

    Raises:
        ConfigError: It cannot be written.
    """
    with writing(name, path):
        if not _is_ordinary(path):
            yield path
            return
        target = Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            yield aside
            sync(aside)
            publish(aside, target)
        finally:
            with suppress(OSError):
                aside.unlink()


def write_output(name: str, path: Path, content: bytes) -> None:
    """Write a file as `file_output` does.

    Raises:
        ConfigError: It cannot be written.
    """
    with file_output(name, path) as aside:
        aside.write_bytes(content)


def _is_ordinary(path: Path) -> bool:
    """Whether a file may take this place; a device or a pipe, like /dev/stdout, is written to."""
    return path.is_file() or not path.exists()


def _probe(folder: Path) -> None:
    """Make a file where the folder is, or would be made."""
    # Raises for a path that no folder can have, such as one below a file.
    while not _is_there(folder):
        folder = folder.parent
    with tempfile.TemporaryFile(dir=folder):
        pass


def _is_there(folder: Path) -> bool:
    try:
        folder.stat()
    except FileNotFoundError:
        return False
    return True


def user_cache(name: str) -> Path:
    """The user's folder for what can be made again, by what it is."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmscale" / name


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
