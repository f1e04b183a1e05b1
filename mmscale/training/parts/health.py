"""Probes of a run: what its embedding space and its updates are like, and what is done about it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmscale.checkpoint.state import RunState
from mmscale.config.training import GuardConfig
from mmscale.contracts import Batch, LossInput, StepRecord
from mmscale.diagnostics.doctor import STILL, InTraining, beside, judge
from mmscale.diagnostics.forgetting import VERDICT as FORGETTING
from mmscale.diagnostics.geometry import PREFIX, PROBE_ROWS, feature_figures, health_figures
from mmscale.diagnostics.pairing import pairing_figures
from mmscale.diagnostics.pairs import Pairs
from mmscale.diagnostics.persistence import COLLAPSE, DEAD, Alarm, Persistence
from mmscale.diagnostics.rules import FEWEST_IMAGES
from mmscale.engine.movement import Moved, Movement, trained_names
from mmscale.errors import ConfigError
from mmscale.outputs import replace_file
from mmscale.parallel.peers import broadcast_object
from mmscale.training.held_out import HeldOutSample
from mmscale.training.part import Halt, Part, Step, StepResult
from mmscale.training.stage import Services, Stage, Timetable

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


class Health(Part):
    """Measures every so many updates, and warns or halts where a verdict lasts."""

    name = "health"
    follows_on_device = True

    def __init__(self, stage: Stage, services: Services):
        self._stage, self._report = stage, services.report
        self._learner, config = stage.learner, stage.config
        self._every = stage.timetable.steps(config.probe.every)
        pairs = min(config.probe.held_out, stage.plan.global_rows)
        if fault := guard_fault(config.guard, stage.timetable, self._every, pairs):
            raise ConfigError(fault)
        # Until then only a contraction counts.
        grace = stage.timetable.steps(config.guard.grace)
        self._persistence = Persistence(config.guard.patience, grace, config.guard.verdicts)
        self._held_out = (
            HeldOutSample(stage.learner, stage.spec, stage.held_out, pairs)
            if stage.held_out
            else None
        )
        self._names = trained_names(stage.learner.engine)
        self._still = frozenset(self._names)
        self._movement: Movement | None = None
        self._moved: Moved | None = None
        self._updates = self._at_limit = 0
        scale: Any = stage.learner.engine.module.get_submodule("scale")
        self._limit = scale.limit() * _AT_LIMIT

    def begin(self, state: RunState) -> None:
        """Look at the space before the first update: what it contracts from."""
        if self._held_out is None or state.step:
            return
        held_out = self._held_out.embedded()
        if self._stage.job.world.is_main and _is_enough(first := health_figures(held_out)):
            self._persistence.begin(first)

    def measures(self, state: RunState) -> bool:
        return (state.step + 1) % self._every == 0

    def waits(self, state: RunState) -> bool:
        return self.measures(state)

    def before(self, step: Step, batch: Batch) -> None:
        is_probed = self.measures(step.state)
        self._movement = Movement(self._learner.engine) if is_probed else None
        self._moved = None

    def follow(self, rows: LossInput, batch: Batch, applied: Tensor | None = None) -> None:
        if self._movement is not None:
            self._moved = self._movement.since(self._names, self._learner.peers)

    def observe(self, result: StepResult, state: RunState) -> Halt | None:
        record = result.record
        self._updates += 1
        self._at_limit += record.logit_scale >= self._limit
        if self._movement is None:
            return None
        line: dict[str, Any] = {
            "step": state.step,
            f"{PREFIX}scale_clamped": self._at_limit / self._updates,
            **loss_figures(record),
        }
        seen = _Seen({})
        if self._moved is not None and record.applied:
            self._still &= self._moved.still
            line |= update_figures(record, self._moved)
            line[f"{PREFIX}never_moved"] = len(self._still)
            seen = self._look(result, state)
        self._movement, self._updates, self._at_limit = None, 0, 0
        if self._still:
            line[STILL] = sorted(self._still)[:_MOST_NAMES]
        self._report.probe(line | seen.line)
        return None if seen.alarm is None else self._respond(seen.alarm, state)

    def state(self) -> dict[str, Any]:
        """What it remembers, as JSON; the main rank's is that of the run."""
        return {
            "persistence": self._persistence.state(),
            "still": sorted(self._still),
            "updates": self._updates,
            "at_limit": self._at_limit,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self._persistence.load(state["persistence"])
        self._still = frozenset(self._names) & frozenset(state["still"])
        self._updates, self._at_limit = int(state["updates"]), int(state["at_limit"])

    def _respond(self, alarm: Alarm, state: RunState) -> Halt | None:
        """Do what `guard.action` says about a verdict that has lasted."""
        action = self._stage.config.guard.action
        if action == "off":
            return None
        sentence = _sentence(alarm, state)
        self._report.warn(sentence)
        if action == "warn":
            return None
        if self._stage.job.world.is_main:
            content = {**alarm.diagnosis.to_json(), "since_step": alarm.began}
            path = self._stage.job.folder / "doctor.json"
            replace_file(path, json.dumps(content, indent=1).encode())
        return Halt(
            f"{sentence}; halted as guard.action=halt says; doctor.json has causes and remedies"
        )

    def _look(self, result: StepResult, state: RunState) -> _Seen:
        """At the space: the main rank judges, all agree. Collective."""
        features = self._features(result.rows)
        ours = self._gathered(result)
        held_out = self._held_out.embedded() if self._held_out else None
        seen = _Seen({})
        if self._stage.job.world.is_main:
            seen = self._judged(state, features, ours, held_out)
        # The others write no line.
        alarm = None if seen.alarm is None else seen.alarm.to_json()
        agreed = broadcast_object(self._stage.job.world, alarm)
        return replace(seen, alarm=None if agreed is None else Alarm.of(agreed))

    def _judged(
        self, state: RunState, features: dict[str, float], ours: Pairs, held_out: Pairs | None
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
        alarm = self._persistence.take(state.step, figures, diagnosis)
        return _Seen({**line, VERDICT: diagnosis.verdict}, alarm)

    def _features(self, rows: LossInput) -> dict[str, float]:
        figures: dict[str, float] = {}
        for modality, side in (("image", rows.image), ("text", rows.text)):
            for place, values in (("tower", side.raw), ("head", side.projected)):
                figures |= feature_figures(values, self._learner.peers, place, modality)
        return {f"{PREFIX}{name}": value for name, value in figures.items()}

    def _gathered(self, result: StepResult) -> Pairs:
        """Rows of the global batch, evenly spread, as many of each rank; what a probe measures."""
        peers, rows, ids = self._learner.peers, result.rows, result.rows.ids
        count = max(1, min(len(ids), PROBE_ROWS // peers.size))
        chosen = torch.arange(count, device=ids.device) * len(ids) // count
        everyone = peers.columns(ids[chosen])
        return Pairs(
            image=peers.columns(rows.image.unit[chosen]),
            text=peers.columns(rows.text.unit[chosen]),
            image_ids=everyone,
            text_ids=everyone,
            backbone_image=peers.columns(rows.image.raw[chosen].float()),
            backbone_text=peers.columns(rows.text.raw[chosen].float()),
            logit_scale=result.record.logit_scale,
        )


def guard_fault(guard: GuardConfig, timetable: Timetable, every: int, pairs: int) -> str | None:
    """Why a guard that is to halt a run never could, in a sentence; None where it may.

    Args:
        guard: Its settings.
        timetable: The run's.
        every: Updates between two probes.
        pairs: Pairs that a probe looks at.
    """
    # What evaluations show needs no probe.
    if guard.action != "halt" or set(guard.verdicts) <= {FORGETTING}:
        return None
    steps, last = timetable.total_steps, (guard.patience - 1) * every
    if every + last > steps:
        return (
            f"guard.action=halt: guard.patience={guard.patience} probes, one every {every} updates "
            f"(probe.every), are more than the {steps} updates of the run have; lower one of them"
        )
    if set(guard.verdicts) <= {COLLAPSE, DEAD, FORGETTING}:
        # A contraction counts from the first probe on, however few its pairs.
        return None
    repair = f"or count a contraction alone: guard.verdicts=[{COLLAPSE}, {DEAD}]"
    grace = timetable.uncut(guard.grace)
    if (grace // every + 1) * every + last > steps:
        return (
            f"guard.action=halt: the {steps} updates of the run have no guard.patience="
            f"{guard.patience} probes after guard.grace={guard.grace}, so that all but a "
            f"contraction of the space would pass; shorten guard.grace, {repair}"
        )
    if pairs < FEWEST_IMAGES:
        return (
            f"guard.action=halt: a probe looks at {pairs} pairs (the smaller of probe.held_out and "
            f"train.global_batch_size), and the doctor judges none of fewer than {FEWEST_IMAGES}; "
            f"raise it, {repair}"
        )
    return None


def _sentence(alarm: Alarm, state: RunState) -> str:
    diagnosis = alarm.diagnosis
    figures = ", ".join(f"{name} {value:.3g}" for name, value in diagnosis.evidence.items())
    return (
        f"step {state.step}: the probes say {diagnosis.verdict} since step {alarm.began} "
        f"({figures}). {diagnosis.causes[0] if diagnosis.causes else ''}".rstrip()
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
