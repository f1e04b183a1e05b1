"""The lines of `metrics.jsonl` that training writes, and what it says at the start."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from mmscale.checkpoint.state import RunState
from mmscale.config.data import DataConfig
from mmscale.contracts import Batch
from mmscale.parallel.device import memory_peak
from mmscale.report.facts import chance_loss
from mmscale.training.part import Part, StepResult
from mmscale.training.stage import Stage

# A first batch with fewer distinct images than this share of its images is warned of.
_FEW = 0.75


def training_line(
    stage: Stage,
    parts: Sequence[Part],
    result: StepResult,
    state: RunState,
    spent: Mapping[str, float],
) -> dict[str, Any]:
    """What one update measured.

    Args:
        stage: The stage.
        parts: Some add figures of theirs.
        result: The update's.
        state: What the run is at after it.
        spent: Seconds of the step by phase; `data`: waiting for the batch, `step`: the whole.
    """
    record, rows = result.record, stage.plan.global_rows
    seconds = spent["step"]
    phases = {phase: share for phase, share in spent.items() if phase != "step"}
    norms = dict(record.grad_norm)
    chance = chance_loss(stage.config.loss.terms, record.terms)
    return {
        "step": state.step,
        "samples": state.samples,
        "loss": record.loss,
        **({} if chance is None else {"loss_chance": chance}),
        **{f"loss/{name}": value for name, value in record.terms.items()},
        "lr": record.lr,
        "logit_scale": record.logit_scale,
        "grad_norm": norms.pop("total"),
        **{f"grad_norm_{part}": norm for part, norm in norms.items()},
        "samples_per_second": rows / seconds,
        "data_wait": spent["data"] / seconds,
        **{f"time/{phase}": share for phase, share in phases.items()},
        "time/other": max(0.0, seconds - sum(phases.values())),
        **_speed(stage, record.tokens, result.batch, seconds),
        "memory_bytes": memory_peak(stage.job.policy.device),
        "keys_digest": record.keys_digest,
        "epoch": state.position.epoch,
        "damaged": state.damaged,
        "captions_cut": record.cut / rows,
        "skipped": state.step - state.updates,
        **{name: value for part in parts for name, value in part.figures().items()},
    }


def _speed(stage: Stage, tokens: int, batch: Batch, seconds: float) -> dict[str, float]:
    """Caption tokens and FLOPs a second over all ranks, and their share of the peak, if known."""
    if stage.flops is None:
        return {}
    policy, world = stage.job.policy, stage.job.world
    rows, peak = stage.plan.global_rows, policy.peak_flops
    flops = stage.flops.update(rows, batch.tokens.shape[1]) / seconds
    speed = {"tokens_per_second": tokens / seconds, "flops_per_second": flops}
    return speed | ({} if peak is None else {"mfu": flops / (world.size * peak)})


def opening_lines(stage: Stage) -> list[str]:
    """What is told before the first update."""
    total, start = stage.timetable.total_steps, stage.start.state
    steps = f"{total:,} step{'s' * (total > 1)}, {stage.timetable.epoch_steps:,} an epoch"
    # A stage begins where the one before it ended; that is no resuming.
    resumed = start.step if start.step > start.stage_start else 0
    engine = stage.learner.engine
    return [
        f"engine: {engine.label}",
        *rates_table(engine.groups, engine.module),
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


HEADINGS = ("part", "tensors", "parameters", "lr", "weight decay")


def rates_table(groups: Iterable[Mapping[str, Any]], model: nn.Module) -> list[str]:
    """A line for each group of trained parameters, and one for what is not trained.

    Args:
        groups: Of the optimizer, before an engine cut them.
        model: What they are part of.
    """
    rows = [
        (
            str(group["name"]),
            f"{len(group['names']):,}",
            f"{group['parameters']:,}",
            f"{group['base_lr']:.3g}",
            f"{group['weight_decay']:.3g}",
        )
        for group in groups
    ]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    rows.append(("frozen", f"{len(frozen):,}", f"{sum(_size(p) for p in frozen):,}", "-", "-"))
    widths = [max(map(len, column)) for column in zip(HEADINGS, *rows, strict=True)]
    return [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(v.rjust(w) for v, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in (HEADINGS, *rows)
    ]


def _size(parameter: Any) -> int:
    # Under ZeRO 3 a parameter holds nothing between forwards.
    return int(getattr(parameter, "ds_numel", parameter.numel()))
