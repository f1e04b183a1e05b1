"""Where figures go besides the run's own log: one interface for all who take them.

A run that trains must neither end nor wait because a service or a disk does: each sink hands on
from a thread of its own, its first failure is told, and from then on it takes nothing.
"""

import importlib
import importlib.util
import math
import queue
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from mmscale.config.schema import Config
from mmscale.errors import ConfigError

# How long a run's end waits for what is left to be handed on.
CLOSING_SECONDS = 20.0
# Lines that wait where a sink hangs; later ones are lost to it, and to it alone.
MOST_WAITING = 20_000
# Lines that are handed on together.
_AT_ONCE = 100


class Sink(ABC):
    """Takes figures while training goes on, and hands them on from a thread of its own.

    Subclasses say how a library begins, takes lines and ends: all three run on that thread.

    Args:
        config: The run.
        warn: Takes a line about what is lost; called from the thread too.
        start_step: Updates already made: the figures of later ones are written anew.

    Raises:
        ConfigError: The library is not installed, or its import fails.

    Attributes:
        setting: Name of the setting that asks for it, `log.NAME`.
        library: What is imported.
        extra: What `pip install 'mmscale[EXTRA]'` brings it.
    """

    setting: ClassVar[str]
    library: ClassVar[str]
    extra: ClassVar[str]

    def __init__(self, config: Config, warn: Callable[[str], None], start_step: int = 0) -> None:
        self.require(config)
        self._imported = self._import(config)
        self._warn, self._start_step = warn, start_step
        self._waiting: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._is_over, self._has_told, self._deadline = False, False, math.inf
        # A daemon: a library that hangs does not keep the process.
        self._thread = threading.Thread(target=self._run_all, args=(config,), daemon=True)
        self._thread.start()

    @classmethod
    def value(cls, config: Config) -> Any:
        """What its setting is."""
        return getattr(config.log, cls.setting)

    @classmethod
    def is_wanted(cls, config: Config) -> bool:
        """Whether the run asks for it."""
        return cls.value(config) not in ("off", False)

    @classmethod
    def require(cls, config: Config) -> None:
        """Refuse a configuration that cannot be followed; the same on every rank.

        Raises:
            ConfigError: It is wanted, and its library is not installed.
        """
        if cls.is_wanted(config) and importlib.util.find_spec(cls.library) is None:
            raise ConfigError(
                f"{cls._asked(config)} needs {cls.library}, which is not installed; "
                f"{cls._repair(config)}"
            )

    @classmethod
    def _asked(cls, config: Config) -> str:
        value = cls.value(config)
        return f"log.{cls.setting}={'true' if value is True else value}"

    @classmethod
    def _repair(cls, config: Config) -> str:
        off = "false" if cls.value(config) is True else "off"
        return f"run pip install 'mmscale[{cls.extra}]' or set log.{cls.setting}={off}"

    def _import(self, config: Config) -> Any:
        try:
            return importlib.import_module(self.library)
        except ImportError as error:
            raise ConfigError(
                f"{self._asked(config)}: importing {self.library} failed ({error}); "
                f"{self._repair(config)}"
            ) from error

    def write(self, line: Mapping[str, Any]) -> None:
        """Take one metric line."""
        self._take(dict(line))

    def _take(self, content: dict[str, Any]) -> None:
        if self._is_over:
            return
        if self._waiting.qsize() < MOST_WAITING:
            self._waiting.put(content)
        elif not self._has_told:
            self._has_told = True
            self._warn(
                f"{self.library} does not keep up: {MOST_WAITING:,} lines wait for it, and further "
                "ones are lost to it; metrics.jsonl has them"
            )

    def stop(self) -> None:
        """Say that nothing more comes; does not wait."""
        if self._deadline == math.inf:
            self._deadline = time.monotonic() + CLOSING_SECONDS
            self._waiting.put(None)

    def close(self) -> None:
        """Wait until what is left is handed on, as far as there is time since `stop`."""
        self.stop()
        self._thread.join(max(0.0, self._deadline - time.monotonic()))
        if self._thread.is_alive():
            self._warn(
                f"{self.library} took longer than {CLOSING_SECONDS:g} s to end and was left alone"
            )

    def _run_all(self, config: Config) -> None:
        try:
            self._begin(config)
            while lines := self._next():
                self._send(lines)
            self._end()
        except Exception as error:  # noqa: BLE001 - a service may fail in any way
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            self._warn(f"{self.library} failed ({reason}); training goes on without it")
        finally:
            self._is_over = True

    def _next(self) -> list[dict[str, Any]]:
        """What waits, once something does; nothing at the end."""
        lines: list[dict[str, Any]] = []
        while not lines or (len(lines) < _AT_ONCE and not self._waiting.empty()):
            line = self._waiting.get()
            if line is None:
                # Found again, as soon as what came before it is handed on.
                if lines:
                    self._waiting.put(None)
                break
            lines.append(line)
        return lines

    @abstractmethod
    def _begin(self, config: Config) -> None:
        """Open the run at the library."""

    @abstractmethod
    def _send(self, lines: list[dict[str, Any]]) -> None:
        """Hand on some lines."""

    @abstractmethod
    def _end(self) -> None:
        """Close the run at the library."""


def figures_of(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line, its step excepted; texts and flags are for the log."""
    return {
        name: float(value)
        for name, value in line.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step"
    }


def kept_id(path: Path, made: Callable[[], str] = lambda: uuid.uuid4().hex) -> str:
    """The id that this run folder has had since its first start.

    Args:
        path: The file that holds it.
        made: Makes it where there is none.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(made(), "utf-8")
    return path.read_text("utf-8").strip()
