"""The one voice of a run: what it measures goes to the log, the console and the sinks from here.

Every rank holds a `Report` and calls it alike; only the main rank's writes and speaks.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mmscale.config.schema import Config
from mmscale.contracts import World
from mmscale.diagnostics.pairs import Pairs
from mmscale.diagnostics.space import require_layout, snapshot
from mmscale.report.console import TrainingConsole
from mmscale.report.metrics import MetricsLog
from mmscale.report.mlflow import MlflowSink
from mmscale.report.page import Page
from mmscale.report.sink import Sink
from mmscale.report.space import SPACE_NAME, SpaceLog
from mmscale.report.tensorboard import TensorboardSink
from mmscale.report.trackio import TrackioSink
from mmscale.report.wandb import WandbSink

SINKS: tuple[type[Sink], ...] = (WandbSink, TensorboardSink, TrackioSink, MlflowSink)


class Report:
    """Takes a run's lines and texts; silent on every rank but the main one.

    Args:
        config: The resolved configuration.
        world: The processes of the run.
        total_steps: Updates in the whole run.
        start_step: Updates already made; past zero, the log is cut back to it and continued.

    Raises:
        ConfigError: A library of a sink, or for maps, is asked for and missing; on every rank.
    """

    def __init__(self, config: Config, world: World, total_steps: int, start_step: int) -> None:
        for kind in SINKS:
            kind.require(config)
        require_layout(config.log.map)
        self._console: TrainingConsole | None = None
        self._lines: MetricsLog | None = None
        self._sinks: list[Sink] = []
        self._space: SpaceLog | None = None
        self._has_told_cuts = False
        self._log = Path(config.run.dir) / "metrics.jsonl"
        if world.is_main:
            self._console = TrainingConsole(total_steps)
            self._lines = _open_log(self._log, start_step, self.warn)
            self._space = SpaceLog(self._log.with_name(SPACE_NAME), start_step)
            wanted = [kind for kind in SINKS if kind.is_wanted(config)]
            self._sinks += [kind(config, self.warn, start_step) for kind in wanted]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def say(self, text: str) -> None:
        """Tell one line."""
        if self._console:
            self._console.say(text)

    def warn(self, text: str) -> None:
        """Tell one line that must not be missed."""
        if self._console:
            self._console.warn(text)

    def training(self, line: Mapping[str, Any]) -> None:
        """Record what one update measured, or several since the last line."""
        self._write(line)
        if line.get("captions_cut") and not self._has_told_cuts:
            self._has_told_cuts = True
            self.warn(
                f"step {line['step']}: {line['captions_cut']:.1%} of the captions are longer than "
                "the text tower's context and were cut (`captions_cut` in metrics.jsonl); raise "
                "model.text.context_length if the tower allows"
            )
        if self._console:
            self._console.training(line)

    def incident(self, line: Mapping[str, Any], text: str) -> None:
        """Record something that went wrong and was borne or not, and tell it."""
        self._write(line)
        self.warn(text)

    def probe(self, line: Mapping[str, Any]) -> None:
        """Record the embedding space's figures (`health/*`)."""
        self._write(line)

    def evaluation(self, line: Mapping[str, Any], pairs: Pairs | None) -> None:
        """Record the figures on evaluation sets (`eval/*`), and what the space looks like."""
        self._write(line)
        if self._space and pairs is not None:
            try:
                self._space.write(line["step"], snapshot(pairs))
            except OSError as error:
                self.warn(f"{SPACE_NAME} could not be written ({error}); training goes on")
        if self._console:
            self._console.evaluation(line)

    def finish(self, line: Mapping[str, Any]) -> None:
        """Record that the run is whole; no line may be recorded afterwards."""
        self._write({"finished": True, **line})

    def page(self, page: Page) -> None:
        """Hand on what the report shows."""
        for sink in self._sinks:
            if isinstance(sink, WandbSink):
                sink.show(page)

    def close(self) -> None:
        """Close the files and free the terminal; may be called twice."""
        if self._console:
            self._console.close()
        if self._lines:
            self._lines.close()
            self._lines = None
        # Told first, so that those that hang are waited for together.
        for sink in self._sinks:
            sink.stop()
        while self._sinks:
            self._sinks.pop().close()

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._lines:
            self._lines.write(line)
        for sink in self._sinks:
            sink.write(line)


def _open_log(path: Path, start_step: int, warn: Callable[[str], None]) -> MetricsLog:
    if start_step == 0:
        # A run that died before its first checkpoint starts over, and so does its log.
        path.unlink(missing_ok=True)
    return MetricsLog.resume(path, start_step, warn)
