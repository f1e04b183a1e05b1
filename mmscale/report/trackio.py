"""Figures to trackio, when `log.trackio` asks for it: on this machine, or a Space or server."""

import os
from pathlib import Path
from typing import Any

from mmscale.config.schema import Config
from mmscale.errors import ConfigError
from mmscale.report.sink import Sink, figures_of, kept_id

# What trackio reads where to send; without either it writes on this machine.
_ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


class TrackioSink(Sink):
    """Logs each line's figures; a resumed run goes on under the same name."""

    setting = library = extra = "trackio"
    _run: Any = None

    @classmethod
    def require(cls, config: Config) -> None:
        super().require(config)
        named = [name for name in _ELSEWHERE if os.environ.get(name)]
        if config.log.trackio == "online" and not named:
            raise ConfigError(
                f"log.trackio=online needs {' or '.join(_ELSEWHERE)}, which say where; set one, or "
                "log.trackio=offline"
            )
        if config.log.trackio == "offline" and named:
            raise ConfigError(
                f"log.trackio=offline would be sent where {named[0]} says; unset it, or set "
                "log.trackio=online"
            )

    def _begin(self, config: Config) -> None:
        folder = Path(config.run.dir)
        self._run = self._imported.init(
            project=config.log.wandb_project,
            # Runs are known by their names, and folders of several sweeps have the same.
            name=f"{folder.name}-{kept_id(folder / 'trackio-id')[:8]}",
            resume="allow",
            embed=False,
            config=config.model_dump(mode="json"),
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def _send(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if figures := figures_of(line):
                self._run.log(figures, step=line.get("step"))

    def _end(self) -> None:
        self._run.finish()
