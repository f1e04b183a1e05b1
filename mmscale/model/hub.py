"""Calls that may reach the Hugging Face hub, made to fail within seconds and in one sentence.

Its client retries a dead network for half a minute a file. Here one short probe, shared by all
calls of the process, decides whether the hub is used or only what is already in the local cache.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from threading import Thread

import httpx
from huggingface_hub import constants

from mmscale.errors import ConfigError
from mmscale.model.foreign import lock_libraries

PROBE_SECONDS = 4.0
# What may be fetched; None: whatever is asked for.
_fetched: Collection[str] | None = None

# Whatever builds a tower comes through here first.
lock_libraries()


@cache
def hub_reachable() -> bool:
    """Whether the hub answers at all, asked once a process."""
    answers: list[int] = []

    def probe() -> None:
        try:
            answers.append(httpx.head(constants.ENDPOINT, timeout=PROBE_SECONDS).status_code)
        except httpx.HTTPError:
            return

    # A name server that does not answer blocks longer than any timeout of the client.
    thread = Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS + 1)
    return bool(answers)


@contextmanager
def fetching_only(names: Collection[str]) -> Iterator[None]:
    """Leave the hub alone but for these names: what a stored file names is not fetched for it."""
    global _fetched
    before, _fetched = _fetched, names
    try:
        yield
    finally:
        _fetched = before


def _may_fetch(setting: str) -> bool:
    return _fetched is None or any(name in setting for name in _fetched)


@contextmanager
def hub_call(setting: str, repair: str, remote: bool = True) -> Iterator[None]:
    """Run a library's loading code; its failures become one ConfigError.

    Args:
        setting: What was asked for, such as `model.text.name=hf:NAME`.
        repair: What the user can do without the hub.
        remote: False where everything is on this machine, so that the hub is not even probed.

    Raises:
        ConfigError: Neither the hub nor the local cache gave what was asked for.
    """
    offline = constants.HF_HUB_OFFLINE
    may_fetch = _may_fetch(setting)
    constants.HF_HUB_OFFLINE = offline or not remote or not may_fetch or not hub_reachable()
    try:
        yield
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())[:240].rstrip(".")
        if remote and not may_fetch:
            reason = "a checkpoint names it, for which nothing is fetched, and the cache lacks it"
        elif remote and constants.HF_HUB_OFFLINE:
            reason = f"{constants.ENDPOINT} cannot be reached and the local cache lacks it"
        raise ConfigError(f"{setting} could not be loaded: {reason}; {repair}.") from error
    finally:
        constants.HF_HUB_OFFLINE = offline
