"""From one stage of a run to the next."""

from dataclasses import replace

from mmscale.assembly import Segment, Training
from mmscale.checkpoint.carried import Carried
from mmscale.checkpoint.state import Progress
from mmscale.config.load import stage_config
from mmscale.config.schema import Config
from mmscale.config.staging import expanded
from mmscale.contracts import Position


def next_stage(training: Training, progress: Progress) -> Segment | None:
    """What follows a stage that is over, built from the weights in memory; None at the run's end.

    Collective.
    """
    number = progress.stage + 1
    if progress.over == "run" or number >= len(expanded(training.run)):
        return None
    config = stage_config(training.run, number)
    start = replace(
        progress,
        stage=number,
        stage_start=progress.step,
        stage_updates=progress.updates,
        position=_start(training.config, config, progress.position),
        over="",
        watched={},
        parts={},
        scaler={},
    )
    return Segment(training.run, Carried(training.engine.tensors(), start), kept=training.kept)


def _start(before: Config, after: Config, position: Position) -> Position:
    """Where the data goes on: in a new pass where batches are made up otherwise from now on."""
    same = (
        before.train.global_batch_size == after.train.global_batch_size
        and before.data.hard_batches == after.data.hard_batches
    )
    return position if same or not position.rows else Position(position.epoch + 1, 0)
