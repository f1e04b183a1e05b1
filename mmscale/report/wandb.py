"""Figures to Weights & Biases, when `log.wandb` asks for it; photographs only where asked again."""

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from mmscale.config.schema import Config
from mmscale.report.examples import Examples
from mmscale.report.page import Page
from mmscale.report.sink import Sink, kept_id

# How long a run's beginning may take where it is sent to.
_STARTING_SECONDS = 15.0


class WandbSink(Sink):
    """Sends metric lines to wandb; a resumed run goes on under the same id."""

    setting = library = extra = "wandb"
    _run: Any = None

    def __init__(self, config: Config, warn: Callable[[str], None], start_step: int = 0) -> None:
        self._with_photographs = config.log.wandb_images
        super().__init__(config, warn, start_step)

    def show(self, page: Page) -> None:
        """Take a page's drawn pictures, and its photographs where `log.wandb_images` is set."""
        content: dict[str, Any] = {
            f"report/{picture.title}": self._imported.Image(_opened(picture.source))
            for picture in page.pictures
        }
        if self._with_photographs:
            content |= {
                f"report/{name}": [
                    self._imported.Image(_opened(source), caption=caption)
                    for source, caption in entries
                ]
                for name, entries in _photographs(page.examples).items()
            }
        self._take(content)

    def _begin(self, config: Config) -> None:
        folder = Path(config.run.dir)
        self._run = self._imported.init(
            project=config.log.wandb_project,
            name=folder.name,
            id=kept_id(folder / "wandb" / "run-id"),
            resume="allow",
            mode=config.log.wandb,
            dir=str(folder),
            config=config.model_dump(mode="json"),
            settings=self._imported.Settings(
                console="off", save_code=False, silent=True, init_timeout=_STARTING_SECONDS
            ),
        )
        self._run.define_metric("*", step_metric="step")

    def _send(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            # log()'s own step must rise, which it does not after a resume: step is a metric.
            self._run.log(line)

    def _end(self) -> None:
        self._run.finish()


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
