"""Probes of a run: what its embedding space and its updates are like, and whether that is well."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mmscale.assembly import Training
from mmscale.checkpoint.state import Progress
from mmscale.contracts import Batch, StepRecord
from mmscale.course.held_out import HeldOutSample
from mmscale.diagnostics.doctor import beside, judge
from mmscale.diagnostics.features import feature_figures
from mmscale.diagnostics.geometry import PREFIX, PROBE_ROWS, health_figures
from mmscale.diagnostics.in_training import STILL, InTraining
from mmscale.diagnostics.pairing import pairing_figures
from mmscale.diagnostics.pairs import Pairs
from mmscale.diagnostics.persistence import Alarm, Persistence
from mmscale.dist.peers import from_main
from mmscale.engine.movement import Moved, Movement, trained_names
from mmscale.engine.step import Update
from mmscale.report.report import Report

# What is logged of the held-out pairs, as `health/heldout_*`.
HELD_OUT = (
    "pairs",
    "auc",
    "auc_centred",
    "delta_z",
    "loss",
    "loss_progress",
    "accuracy_i2t",
    "accuracy_t2i",
    "variance_image",
    "variance_text",
    "cka_z",
    "backbone_cka_z",
)
VERDICT = "verdict"
_MOST_NAMES = 20
_AT_LIMIT = 1 - 1e-6


@dataclass(frozen=True)
class _Seen:
    """What the main rank makes of a probe.

    Attributes:
        line: Figures for the log.
        alarm: A verdict that has lasted too long.
    """

    line: dict[str, Any]
    alarm: Alarm | None = None


class Probes:
    """Measures every so many updates. Ranks call it alike.

    Args:
        training: The segment that is watched.
        report: Takes the figures.
    """

    def __init__(self, training: Training, report: Report):
        self._training, self._report = training, report
        guard = training.config.guard
        self._every = training.steps(training.config.probe.every)
        # Until then only a contraction counts.
        grace = training.steps(guard.grace)
        self._persistence = Persistence(guard.patience, grace, guard.verdicts)
        pairs = min(training.config.probe.held_out, training.plan.global_rows)
        held_out = training.held_out
        self._held_out = HeldOutSample(training, held_out, pairs) if held_out else None
        self._names = trained_names(training.engine)
        self._still = frozenset(self._names)
        self._movement: Movement | None = None
        self._updates = self._at_limit = 0
        if self._held_out is not None and training.start.step == 0:
            self._begin(self._held_out.embedded())

    def state(self) -> dict[str, Any]:
        """What it remembers, as JSON; the main rank's is that of the run."""
        return {
            "persistence": self._persistence.state(),
            "still": sorted(self._still),
            "updates": self._updates,
            "at_limit": self._at_limit,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""
        self._persistence.load(state["persistence"])
        self._still = frozenset(self._names) & frozenset(state["still"])
        self._updates, self._at_limit = int(state["updates"]), int(state["at_limit"])

    def _begin(self, held_out: Pairs) -> None:
        if self._training.world.is_main and _is_enough(first := health_figures(held_out)):
            self._persistence.begin(first)

    def before(self, progress: Progress) -> bool:
        """Whether the coming update is probed; then, look at the weights that it changes."""
        if (progress.step + 1) % self._every == 0:
            self._movement = Movement(self._training.engine)
        return self._movement is not None

    def after(self, progress: Progress, done: Update, batch: Batch) -> Alarm | None:
        """Count an update; at a probe, measure, and tell what has lasted too long. Collective."""
        self._updates += 1
        limit = self._training.config.model.logit_scale.max * _AT_LIMIT
        self._at_limit += done.record.logit_scale >= limit
        if self._movement is None:
            return None
        line: dict[str, Any] = {
            "step": progress.step,
            f"{PREFIX}scale_clamped": self._at_limit / self._updates,
            **loss_figures(done.record),
        }
        seen = _Seen({})
        if done.record.applied:
            moved = self._movement.since(self._names, self._training.peers)
            self._still &= moved.still
            line |= update_figures(done.record, moved)
            line[f"{PREFIX}never_moved"] = len(self._still)
            seen = self._look(progress, done, batch)
        self._movement, self._updates, self._at_limit = None, 0, 0
        if self._still:
            line[STILL] = sorted(self._still)[:_MOST_NAMES]
        self._report.probe(line | seen.line)
        return seen.alarm

    def _look(self, progress: Progress, done: Update, batch: Batch) -> _Seen:
        """At the space: the main rank judges, all agree. Collective."""
        features = self._features(done)
        ours = self._gathered(done, batch)
        held_out = self._held_out.embedded() if self._held_out else None
        seen = None
        if self._training.world.is_main:
            seen = self._judged(progress, features, ours, held_out)
        agreed: _Seen = from_main(self._training.world, seen)
        return agreed

    def _judged(
        self, progress: Progress, features: dict[str, float], ours: Pairs, held_out: Pairs | None
    ) -> _Seen:
        line = health_figures(ours) | pairing_figures(ours) | features
        training = InTraining.of({**line, STILL: sorted(self._still)})
        figures = line
        if held_out is not None:
            figures = health_figures(held_out) | pairing_figures(held_out)
            names = {f"{PREFIX}{name}": f"{PREFIX}heldout_{name}" for name in HELD_OUT}
            line |= {new: figures[name] for name, new in names.items() if name in figures}
            if training is not None:
                figures = figures | beside(training, figures)
        if not _is_enough(figures):
            return _Seen(line)
        diagnosis = judge(figures, training)
        alarm = self._persistence.take(progress.step, figures, diagnosis)
        return _Seen({**line, VERDICT: diagnosis.verdict}, alarm)

    def _features(self, done: Update) -> dict[str, float]:
        figures: dict[str, float] = {}
        for modality, rows in (("image", done.image), ("text", done.text)):
            for place, values in (("tower", rows.raw), ("head", rows.projected)):
                figures |= feature_figures(values, self._training.peers, place, modality)
        return {f"{PREFIX}{name}": value for name, value in figures.items()}

    def _gathered(self, done: Update, batch: Batch) -> Pairs:
        """Rows of the global batch, evenly spread, as many of each rank; what a probe measures."""
        peers, rows = self._training.peers, len(batch)
        count = max(1, min(rows, PROBE_ROWS // peers.size))
        chosen = torch.arange(count, device=batch.match_ids.device) * rows // count
        ids = peers.columns(batch.match_ids[chosen])
        return Pairs(
            image=peers.columns(done.image.unit[chosen]),
            text=peers.columns(done.text.unit[chosen]),
            image_ids=ids,
            text_ids=ids,
            backbone_image=peers.columns(done.image.raw[chosen].float()),
            backbone_text=peers.columns(done.text.raw[chosen].float()),
            logit_scale=done.record.logit_scale,
        )


def _is_enough(figures: dict[str, float]) -> bool:
    """Whether there are more than a handful of pairs, so that something can be said."""
    return f"{PREFIX}auc" in figures


def loss_figures(record: StepRecord) -> dict[str, float]:
    """How far each term has come from its chance value (0) to its floor (1)."""
    figures = {}
    for name, value in record.terms.items():
        floor, chance = record.terms.get(f"{name}_floor"), record.terms.get(f"{name}_chance")
        if floor is not None and chance is not None and chance > floor:
            figures[f"{PREFIX}progress_{name}"] = (chance - value) / (chance - floor)
    return figures


def update_figures(record: StepRecord, moved: Moved) -> dict[str, float]:
    """Gradients by part, updates as shares of the weights, and the towers against each other.

    `imbalance` is the image tower's gradient as a share of its weights over the text tower's: both
    towers share one loss, so that it tells which of them the loss pulls at.
    """
    figures = {
        f"{PREFIX}grad_norm_{part}": norm for part, norm in record.grad_norm_parts.items() if norm
    }
    figures |= {f"{PREFIX}update_{part}": share for part, share in moved.shares.items()}
    pulls = [
        record.grad_norm[tower] / moved.lengths[tower]
        for tower in ("vision", "text")
        if tower in moved.lengths
    ]
    if len(pulls) == 2 and pulls[1] > 0:
        figures[f"{PREFIX}imbalance"] = pulls[0] / pulls[1]
    return figures
