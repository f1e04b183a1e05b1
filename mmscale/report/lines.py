"""The lines of `metrics.jsonl` that training writes."""

from collections.abc import Mapping
from typing import Any

from mmscale.assembly import Training
from mmscale.checkpoint.state import Progress
from mmscale.config.schema import DataConfig
from mmscale.contracts import Batch
from mmscale.dist.device import memory_peak
from mmscale.engine.step import Update
from mmscale.report.chance import chance_loss
from mmscale.report.rates import rates_table

# A first batch with fewer distinct images than this share of its images is warned of.
_FEW = 0.75
# What a balancer of the towers reports, where one is at work.
BALANCE = ("balance", "update_vision", "update_text")


def training_line(
    training: Training,
    progress: Progress,
    done: Update,
    seconds: float,
    spent: Mapping[str, float],
    batch: Batch,
) -> dict[str, Any]:
    """What one update measured.

    Args:
        training: The run.
        progress: After the update.
        done: The update.
        seconds: The whole step's time.
        spent: Seconds of it by phase; `data`: waiting for the batch.
        batch: This rank's rows.
    """
    record, rows = done.record, training.plan.global_rows
    norms = dict(record.grad_norm)
    chance = chance_loss(training.config.loss.terms, record.terms)
    return {
        "step": progress.step,
        "samples": progress.samples,
        "loss": record.loss,
        **({} if chance is None else {"loss_chance": chance}),
        **{f"loss/{name}": value for name, value in record.terms.items()},
        "lr": record.lr,
        "logit_scale": record.logit_scale,
        "grad_norm": norms.pop("total"),
        **{f"grad_norm_{part}": norm for part, norm in norms.items()},
        "samples_per_second": rows / seconds,
        "data_wait": spent["data"] / seconds,
        **{f"time/{phase}": share for phase, share in spent.items()},
        "time/other": max(0.0, seconds - sum(spent.values())),
        **_speed(training, record.tokens, batch, seconds),
        "memory_bytes": memory_peak(training.policy.device),
        "keys_digest": record.keys_digest,
        "epoch": progress.position.epoch,
        "damaged": progress.damaged,
        "captions_cut": record.cut / rows,
        "skipped": progress.step - progress.updates,
        **{name: progress.watched[name] for name in BALANCE if name in progress.watched},
    }


def _speed(training: Training, tokens: int, batch: Batch, seconds: float) -> dict[str, float]:
    """Caption tokens and FLOPs a second over all ranks, and their share of the peak, if known."""
    if training.flops is None:
        return {}
    rows, peak = training.plan.global_rows, training.policy.peak_flops
    flops = training.flops.update(rows, batch.tokens.shape[1]) / seconds
    speed = {"tokens_per_second": tokens / seconds, "flops_per_second": flops}
    return speed | ({} if peak is None else {"mfu": flops / (training.world.size * peak)})


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


def repeats_warning(batch: Batch, data: DataConfig) -> str | None:
    """What to say of a first batch in which images repeat more often than a sound order lets them.

    Args:
        batch: This rank's rows.
        data: Says how many rows an image gives to a batch.
    """
    images = len(batch.image_ids) // data.rows_per_item
    distinct = len(batch.image_ids.unique())
    if images < 2 or distinct >= _FEW * images:
        return None
    return (
        f"only {distinct} of the {images} images of the first batch are distinct, and another "
        "caption of the same image is no negative; give data.train more images, lower "
        "train.global_batch_size, or look for ids that samples share"
    )


def rows_of(batch: Batch) -> list[list[int]]:
    """Token ids of the batch's captions without padding; none where it holds features."""
    if batch.mask is None:
        return []
    pairs = zip(batch.tokens, batch.mask, strict=True)
    return [tokens[mask].tolist() for tokens, mask in pairs]
