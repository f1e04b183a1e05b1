"""A run's folder mirrored to a bucket (`run.sync`) while it trains, and fetched where it is empty.

A kill may leave the mirror behind, but never with a checkpoint that looks whole and is not: the
`state.sha256` without which a checkpoint is none is put last and removed first.
"""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeAlias

from mmscale.checkpoint.files import PARTIAL, best_blend, step_folders
from mmscale.checkpoint.lock import LOCK
from mmscale.checkpoint.resume import NAMED, RUN_FILES, require_like
from mmscale.checkpoint.state import DIGEST
from mmscale.checkpoint.write import OLD, adopt_partial
from mmscale.config.schema import Config, RunConfig
from mmscale.contracts import World
from mmscale.data.buckets import Buckets, require_extra
from mmscale.data.remote import NotThereError
from mmscale.errors import ConfigError, DataError, HaltError, TerminatedError
from mmscale.parallel.peers import broadcast_object

Tell: TypeAlias = Callable[[str], None]

_CHECKPOINTS, _FETCHED = "checkpoints/", "checkpoints.fetched"
_UNFINISHED = (PARTIAL, OLD, ".fetched")
# Between two looks for new checkpoints, two copies of the log, and two attempts that fail.
_LOOK_SECONDS, _LOG_SECONDS, _AGAIN_SECONDS = 1.0, 60.0, 15.0
# For what is left at the end: of attempts that fail, of all, and of a run that failed itself.
_TRYING_SECONDS, _END_SECONDS, _FAILED_SECONDS = 15.0, 600.0, 10.0
_POLL_SECONDS = 1.0


class Mirror:
    """Copies the folder of a run by a thread of rank 0, from `start` to the end of its block.

    Training does not wait for it; what it waits for, a process beside this one sends.
    """

    def __init__(self, run: RunConfig, world: World):
        self._folder, self._to = Path(run.dir), run.sync if world.is_main else None
        self._over = threading.Event()
        self._tell: Tell = print
        self._thread: threading.Thread | None = None
        self._copier: _Copier | None = None
        self._fault = ""

    def __enter__(self) -> "Mirror":
        return self

    def start(self, tell: Tell) -> None:
        """Begin to copy; the folder is this run's by now.

        Args:
            tell: Takes a line about what could not be copied.
        """
        if self._to is None:
            return
        self._copier, self._tell = _Copier(self._folder, self._to), tell
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._thread is None or self._copier is None:
            return
        self._over.set()
        by_design = error is None or isinstance(error, HaltError | TerminatedError)
        self._thread.join(_END_SECONDS if by_design else _FAILED_SECONDS)
        if self._thread.is_alive() or self._fault:
            left = self._copier.left()
            such = f", such as {left[0]}" if left else ""
            self._tell(
                f"run.sync={self._to}: {len(left)} files were not copied{such}; they are in "
                f"{self._folder}, and the same command copies them"
            )

    def _work(self) -> None:
        assert self._copier is not None, "started"
        copied = -_LOG_SECONDS
        while not self._over.wait(_LOOK_SECONDS):
            pause = _AGAIN_SECONDS if self._fault else _LOG_SECONDS
            is_due = time.monotonic() > copied + pause
            if is_due or (not self._fault and self._copier.has_fresh()):
                self._copy(self._copier)
                copied = time.monotonic()
        deadline = time.monotonic() + _TRYING_SECONDS
        while not self._copy(self._copier) and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)

    def _copy(self, copier: "_Copier") -> bool:
        """Bring the mirror up to date; whether that went well."""
        try:
            copier.copy()
        except (DataError, OSError) as error:
            if not self._fault:
                self._tell(f"run.sync: {error}: the run goes on, and copying is tried again")
            self._fault = str(error)
            return False
        if self._fault:
            self._tell(f"run.sync={self._to}: everything is copied again")
        self._fault = ""
        return True


class _Copier:
    """The mirror as far as it is known, and what brings it up to date."""

    def __init__(self, folder: Path, to: str):
        self._folder, self._to, self._store = folder, to, Buckets()
        # Names of what is there, seals of checkpoints there, and what was put as it was then.
        self._there: set[str] | None = None
        self._seals: dict[str, bytes] = {}
        self._put: dict[str, tuple[int, ...]] = {}

    def has_fresh(self) -> bool:
        """Whether there are other checkpoints than in the mirror."""
        return self._own_seals().keys() != self._seals.keys()

    def left(self) -> list[str]:
        """Names of the files that are not in the mirror as they are here."""
        own = self._own_seals()
        fresh = [folder for folder in own if self._seals.get(folder) != own[folder]]
        names = [name for folder in fresh for name in self._names(folder)]
        return [name for name in [*names, *self._names()] if self._differs(name)]

    def copy(self) -> None:
        """Put what is new, and remove what is gone.

        Raises:
            DataError: The bucket fails, or refuses.
        """
        if self._there is None:
            there = self._store.walk(self._to)
            self._seals = _seals(self._store, self._to, there)
            self._there = set(there)
        own = self._own_seals()
        fresh = [name for name, seal in own.items() if self._seals.get(name) != seal]
        for folder in fresh:
            if self._seals.pop(folder, None):
                self._remove(f"{folder}/{DIGEST}")
            for name in self._names(folder):
                if not name.endswith(f"/{DIGEST}"):
                    self._bring(name)
        # The log comes before the seal: it holds what a checkpoint goes on from.
        for name in self._names():
            self._bring(name)
        for folder in fresh:
            # It may have been removed meanwhile, or written anew.
            if self._own_seals().get(folder) == own[folder]:
                self._bring(f"{folder}/{DIGEST}")
                self._seals[folder] = own[folder]
        self._prune(own)

    def _prune(self, own: dict[str, bytes]) -> None:
        """Remove the checkpoints that the run has removed.

        Where none is seen the folder itself may be gone, and this is all that is left of it.
        """
        assert self._there is not None, "looked up before"
        if own:
            gone = {_folder_of(name) for name in self._there} - {"", *own}
            names = [name for name in self._there if _folder_of(name) in gone]
            for name in sorted(names, key=lambda name: not name.endswith(DIGEST)):
                self._remove(name)
            self._seals = {name: seal for name, seal in self._seals.items() if name in own}

    def _own_seals(self) -> dict[str, bytes]:
        found = {}
        for folder in (*step_folders(self._folder), best_blend(self._folder)):
            try:
                seal = (folder / DIGEST).read_bytes()
            except OSError:
                continue
            found[folder.relative_to(self._folder).as_posix()] = seal
        return found

    def _names(self, folder: str = "") -> Iterator[str]:
        """Names of the files of a checkpoint, or of all that are in none."""
        for path in sorted((self._folder / folder).rglob("*")):
            name = path.relative_to(self._folder).as_posix()
            is_asked = _is_mirrored(name) and bool(folder) == bool(_folder_of(name))
            # A link leads anywhere.
            if is_asked and path.is_file() and not path.is_symlink():
                yield name

    def _bring(self, name: str) -> None:
        assert self._there is not None, "looked up before"
        if not self._differs(name):
            return
        path = self._folder / name
        try:
            stamp = _stamp(path)
            self._store.put(f"{self._to}/{name}", path)
        except (DataError, OSError):
            if path.exists():
                raise
            return
        self._put[name] = stamp
        self._there.add(name)

    def _differs(self, name: str) -> bool:
        try:
            return self._put.get(name) != _stamp(self._folder / name)
        except OSError:
            return False

    def _remove(self, name: str) -> None:
        assert self._there is not None, "looked up before"
        self._store.delete(f"{self._to}/{name}")
        self._there.discard(name)
        self._put.pop(name, None)


def meet(config: Config, world: World, tell: Tell) -> None:
    """Before anything looks into `run.dir`: an empty one takes what `run.sync` holds. Collective.

    Args:
        config: The run's, presets filled.
        world: The ranks; rank 0 fetches, into the folder that all see.
        tell: Takes a line about what is fetched.

    Raises:
        ConfigError: The bucket holds another run, or a later state of this one.
        DataError: The bucket fails, or refuses.
    """
    if config.run.sync is None:
        return
    with ThreadPoolExecutor(1, "fetch") as pool:
        work = pool.submit(_meet, config, config.run.sync, tell) if world.is_main else None
        # Told again and again, so that no rank waits for longer than a moment.
        while (answer := broadcast_object(world, work and _answer(work))) is None:
            continue
    if answer:
        raise (ConfigError if answer[0] == "config" else DataError)(answer[1])


def _answer(work: "Future[None]") -> list[str] | None:
    """Kind and text of a fault; empty without one, None as long as nothing is known."""
    if not wait([work], _POLL_SECONDS).done:
        return None
    try:
        work.result()
    except ConfigError as error:
        return ["config", str(error)]
    except (DataError, OSError) as error:
        return ["data", str(error)]
    return []


def _meet(config: Config, to: str, tell: Tell) -> None:
    run_dir, resume = Path(config.run.dir), config.run.resume
    require_extra(to)
    with closing(Buckets()) as store:
        there = store.walk(to)
        seals = _seals(store, to, there)
        if resume == "never" and config.run.overwrite:
            old = [name for name in there if _folder_of(name) or name in RUN_FILES]
            for name in sorted(old, key=lambda name: not name.endswith(DIGEST)):
                store.delete(f"{to}/{name}")
            return
        steps = sorted(name for name in seals if name.startswith(_CHECKPOINTS))
        if not steps:
            return
        if resume != "auto":
            raise ConfigError(
                f"run.resume={resume}, but run.sync={to} holds a run; set another run.sync, or "
                "run.resume=never run.overwrite=true to replace it"
            )
        _require_same(store, to, config)
        adopt_partial(run_dir)
        if step_folders(run_dir):
            _require_not_ahead(run_dir, to, seals, steps)
            return
        tell(f"run.sync={to}: fetching the run, which is at {steps[-1].rpartition('/')[2]}")
        _fetch(store, to, run_dir, [n for n in there if _folder_of(n) in ("", *seals)])


def _require_same(store: Buckets, to: str, config: Config) -> None:
    """Refuse a bucket with a run of other settings."""
    with TemporaryDirectory() as aside:
        copy = Path(aside) / "config.yaml"
        try:
            copy.write_bytes(b"".join(store.chunks(f"{to}/config.yaml")))
        except NotThereError:
            return
        # Data and weights may lie elsewhere here; what they hold is compared later.
        require_like(copy, config, f"run.sync={to}", dict.fromkeys(NAMED, ""))


def _require_not_ahead(run_dir: Path, to: str, seals: dict[str, bytes], steps: list[str]) -> None:
    """Refuse a folder that lacks what the bucket has of the same run."""
    own = {f"{_CHECKPOINTS}{path.name}": path for path in step_folders(run_dir)}
    others = [
        name
        for name in steps
        if (name in own and (own[name] / DIGEST).read_bytes() != seals[name]) or name > max(own)
    ]
    if others:
        raise ConfigError(
            f"run.sync={to} holds {others[-1].rpartition('/')[2]}, which run.dir={run_dir} does "
            "not have: the run has gone on elsewhere; move that folder away to go on from the "
            "bucket, or set another run.sync"
        )


def _fetch(store: Buckets, to: str, run_dir: Path, names: list[str]) -> None:
    """Copy files of the mirror; the checkpoints appear together, when everything is here."""
    aside, count = run_dir / _FETCHED, len(_CHECKPOINTS)
    shutil.rmtree(aside, ignore_errors=True)
    for name in sorted(filter(_is_mirrored, names)):
        is_step = name.startswith(_CHECKPOINTS)
        path = aside / name[count:] if is_step else run_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file, closing(store.chunks(f"{to}/{name}")) as chunks:
            for chunk in chunks:
                file.write(chunk)
    shutil.rmtree(run_dir / _CHECKPOINTS, ignore_errors=True)
    aside.rename(run_dir / _CHECKPOINTS)


def _seals(store: Buckets, to: str, names: dict[str, int]) -> dict[str, bytes]:
    """Of each checkpoint in a mirror that is whole, what says so."""
    found = [name for name in names if name.endswith(f"/{DIGEST}") and _folder_of(name)]
    return {_folder_of(name): b"".join(store.chunks(f"{to}/{name}")) for name in found}


def _folder_of(name: str) -> str:
    """The checkpoint that a file belongs to; empty where it belongs to none."""
    parts = name.split("/")
    if parts[0] == "best":
        return "best"
    return "/".join(parts[:2]) if parts[0] == _CHECKPOINTS[:-1] else ""


def _is_mirrored(name: str) -> bool:
    """Whether a file is part of the run: what is being written is not, nor are caches."""
    parts = name.split("/")
    # A bucket's names may be anybody's: none leads out of the folder.
    is_plain = all(part and not part.startswith(".") for part in parts) and "\0" not in name
    is_partial = any(part.endswith(_UNFINISHED) for part in parts[:-1])
    is_cache = name.endswith(".safetensors") and not _folder_of(name)
    return is_plain and name != LOCK and not is_cache and not is_partial


def _stamp(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return (status.st_ino, status.st_size, status.st_mtime_ns)
