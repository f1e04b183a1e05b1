"""Figures to Weights & Biases, when `log.wandb` asks for it; photographs only where asked again.

A run that trains must neither end nor wait because a web service does: a thread sends, failures are
told once, then ignored.
"""

import base64
import importlib
import importlib.util
import io
import queue
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from mmscale.config.schema import Config
from mmscale.errors import ConfigError
from mmscale.report.examples import Examples
from mmscale.report.page import Page


def require_wandb(config: Config) -> None:
    """Refuse a configuration that wants wandb where it is not installed; the same on every rank.

    Raises:
        ConfigError: `log.wandb` is not `off` and wandb cannot be found.
    """
    if config.log.wandb != "off" and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"log.wandb={config.log.wandb} needs wandb, which is not installed; "
            "run pip install 'mmscale[wandb]' or set log.wandb=off"
        )


# How long a run's beginning may take where it is sent to, and how long its end waits for the rest.
_STARTING_SECONDS = 15.0
_CLOSING_SECONDS = 20.0
_STARTING_SECONDS = 15.0


class WandbSink:
    """Sends metric lines to wandb; a resumed run goes on under the same id.

    Raises:
        ConfigError: wandb is not installed, or its import fails.
    """

    def __init__(self, config: Config, warn: Callable[[str], None]) -> None:
        require_wandb(config)
        self._warn = warn
        self._run: Any = None
        self._wandb = _import_wandb(config)
        self._with_photographs = config.log.wandb_images
        self._content: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._send, args=(config,), daemon=True)
        self._thread.start()

    def write(self, line: Mapping[str, Any]) -> None:
        """Take one metric line to be sent."""
        # log()'s own step must rise, which it does not after a resume: step is a metric instead.
        self._content.put(dict(line))

    def show(self, page: Page) -> None:
        """Take a page's drawn pictures, and its photographs where `log.wandb_images` is set."""
        content: dict[str, Any] = {
            f"report/{picture.title}": self._wandb.Image(_opened(picture.source))
            for picture in page.pictures
        }
        if self._with_photographs:
            content |= {
                f"report/{name}": [
                    self._wandb.Image(_opened(source), caption=caption)
                    for source, caption in entries
                ]
                for name, entries in _photographs(page.examples).items()
            }
        self._content.put(content)

    def close(self) -> None:
        """Send what is left and end the wandb run, as far as there is time for it."""
        self._content.put(None)
        self._thread.join(_CLOSING_SECONDS)
        if self._thread.is_alive():
            self._warn(f"wandb took longer than {_CLOSING_SECONDS:g} s to end and was left alone")

    def _send(self, config: Config) -> None:
        try:
            self._start(self._wandb, config)
            while (content := self._content.get()) is not None:
                self._run.log(content)
            self._run.finish()
        except Exception as error:  # noqa: BLE001 - a web service may fail in any way
            self._warn(f"wandb failed ({error}); training goes on without it")

    def _start(self, wandb: Any, config: Config) -> None:
        folder = Path(config.run.dir)
        self._run = wandb.init(
            project=config.log.wandb_project,
            name=folder.name,
            id=_run_id(folder),
            resume="allow",
            mode=config.log.wandb,
            dir=str(folder),
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(
                console="off", save_code=False, silent=True, init_timeout=_STARTING_SECONDS
            ),
        )
        self._run.define_metric("*", step_metric="step")


def _import_wandb(config: Config) -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ConfigError(
            f"log.wandb={config.log.wandb}: importing wandb failed ({error}); "
            "run pip install 'mmscale[wandb]' or set log.wandb=off"
        ) from error


def _photographs(examples: Examples) -> dict[str, list[tuple[str, str]]]:
    """Photographs of the gallery with what is said of them."""
    lists = {
        "best retrievals": [
            (entry.photo, f"{entry.way}, rank {entry.rank}: {entry.caption}")
            for entry in examples.best
        ],
        "worst retrievals": [
            (entry.photo, f"{entry.way}, rank {entry.rank}: {entry.caption}")
            for entry in examples.worst
        ],
        "doubtful captions": [
            (entry.photo, f"cosine {entry.similarity:.2f}: {entry.caption}")
            for entry in examples.doubts
        ],
    }
    shown = {
        name: [
            (picture, caption)
            for photo, caption in entries
            if (picture := examples.photos[photo].picture) is not None
        ]
        for name, entries in lists.items()
    }
    return {name: entries for name, entries in shown.items() if entries}


def _opened(source: str) -> Image.Image:
    content = base64.b64decode(source.partition(",")[2])
    return Image.open(io.BytesIO(content), formats=("PNG", "WEBP"))


def _run_id(folder: Path) -> str:
    """The id that this run folder has had since its first start."""
    path = folder / "wandb" / "run-id"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(uuid.uuid4().hex, "utf-8")
    return path.read_text("utf-8").strip()
