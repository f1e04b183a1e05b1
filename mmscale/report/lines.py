"""The lines of `metrics.jsonl` that training writes."""

from typing import Any

from mmscale.assembly import Training
from mmscale.checkpoint.files import Progress
from mmscale.contracts import Batch
from mmscale.engine.step import Update
from mmscale.report.rates import rates_table


def training_line(
    training: Training, progress: Progress, done: Update, seconds: float, waited: float
) -> dict[str, Any]:
    """What one update measured.

    Args:
        training: The run.
        progress: After the update.
        done: The update.
        seconds: The whole step's time.
        waited: Seconds of it spent waiting for data.
    """
    record, rows = done.record, training.plan.global_rows
    norms = dict(record.grad_norm)
    return {
        "step": progress.step,
        "samples": progress.samples,
        "loss": record.loss,
        **{f"loss/{name}": value for name, value in record.terms.items()},
        "lr": record.lr,
        "logit_scale": record.logit_scale,
        "grad_norm": norms.pop("total"),
        **{f"grad_norm_{part}": norm for part, norm in norms.items()},
        "samples_per_second": rows / seconds,
        "data_wait": waited / seconds,
        "keys_digest": record.keys_digest,
        "epoch": progress.position.epoch,
        "damaged": progress.damaged,
        "captions_cut": record.cut / rows,
        "skipped": progress.step - progress.updates,
    }


def opening_lines(training: Training) -> list[str]:
    """What is told before the first update."""
    total = training.total_steps
    steps = f"{total:,} step{'s' * (total > 1)}, {training.schedule.steps:,} an epoch"
    start = training.start
    # A stage begins where the one before it ended; that is no resuming.
    resumed = start.step if start.step > start.stage_start else 0
    return [
        f"engine: {training.engine.label}",
        *rates_table(training.engine.groups, training.engine.module),
        f"length: {steps}" + (f"; resumed after step {resumed:,}" if resumed else ""),
    ]


def first_batch_line(batch: Batch) -> str:
    """A look at this rank's first rows: what really reaches the model."""
    image = batch.image.float()
    shapes = f"images {list(batch.image.shape)}, captions {list(batch.tokens.shape)}"
    spread = f"image mean {image.mean():.3f}, deviation {image.std():.3f}"
    ids = f"{len(batch.image_ids.unique())} distinct images, {batch.cut} captions cut"
    return f"first batch: {shapes}, {spread}, {ids}; {batch.keys[0]}: {batch.captions[0]}"
