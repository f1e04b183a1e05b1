"""Figures to TensorBoard's event files in `RUN/tensorboard`, when `log.tensorboard` asks for it."""

from pathlib import Path
from typing import Any

from mmscale.config.schema import Config
from mmscale.report.sink import Sink, figures_of


class TensorboardSink(Sink):
    """Writes each figure as a scalar at its step.

    A resumed run writes a further file, which tells readers to drop what the others hold from there
    on.
    """

    setting = library = extra = "tensorboard"
    _writer: Any = None

    def _begin(self, config: Config) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(config.run.dir) / "tensorboard"
        purge = self._start_step + 1 if self._start_step else None
        self._writer = SummaryWriter(str(folder), purge_step=purge)

    def _send(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            for name, value in figures_of(line).items():
                self._writer.add_scalar(name, value, line.get("step"))
        self._writer.flush()

    def _end(self) -> None:
        self._writer.close()
