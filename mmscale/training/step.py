"""One update: rows to loss to gradient to weights, agreed on in one small reduction.

Where the host runs ahead of the device, the reduction, the clip and the decision to skip are made
on the device. The record of an update is then looked at when the one after it is on its way, unless
a part acts right after it; elsewhere every record is there at once.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmscale.checkpoint.state import RunState
from mmscale.contracts import (
    Batch,
    Embeddings,
    Features,
    LossInput,
    Peers,
    Position,
    StepRecord,
)
from mmscale.engine.gradient_cache import StepOutput, encode_rows, forward_backward
from mmscale.engine.protocol import Engine
from mmscale.loss.objective import Objective
from mmscale.parallel.phases import PhaseClock, phase
from mmscale.training.agreement import Outcome, agree
from mmscale.training.beside import joined, parted
from mmscale.training.part import Part, Step, StepResult


@dataclass(frozen=True)
class Learner:
    """What computes an update and applies it.

    Attributes:
        engine: Holds the model.
        objective: Rows to loss.
        peers: All ranks, whatever the objective contrasts with.
        micro_rows: Rows forwarded at once.
    """

    engine: Engine
    objective: Objective
    peers: Peers
    micro_rows: int


@dataclass(frozen=True)
class Launched:
    """An update that the device may still be at.

    Attributes:
        outcome: Its figures, or the way to them.
        rows: What the objective saw, without a graph.
        batch: This rank's rows, without pixels: they are not held any longer.
    """

    outcome: StepRecord | Outcome
    rows: LossInput
    batch: Batch

    @property
    def is_known(self) -> bool:
        """Whether `result` need not wait."""
        return isinstance(self.outcome, StepRecord)

    def result(self, overtaken: bool = False) -> StepResult:
        """What the update gave; waits for the device.

        Args:
            overtaken: The update after it has been launched.
        """
        record = self.outcome if isinstance(self.outcome, StepRecord) else self.outcome.record()
        return StepResult(record, self.rows, self.batch, overtaken)


def train_step(
    learner: Learner, batch: Batch, step: Step, parts: Sequence[Part] = ()
) -> StepResult:
    """Train on one batch, and wait for what it gave: `launch` has the arguments. Collective."""
    return launch(learner, batch, step, parts).result()


def launch(learner: Learner, batch: Batch, step: Step, parts: Sequence[Part] = ()) -> Launched:
    """Train on one batch; waits for it only where the engine or a part must. Collective.

    Args:
        learner: Model, objective and ranks.
        batch: This rank's rows, on the engine's device.
        step: Which update, and its rates.
        parts: What the update uses besides the model, in an order equal on all ranks.
    """
    engine = learner.engine
    scale_module: Any = engine.module.get_submodule("scale")
    scale_module.begin(step.number)
    for part in parts:
        part.before(step, batch)
    beside = {name: more for part in parts for name, more in part.beside(step).items()}
    fed = joined(batch, beside)

    def compute_loss(features: Features) -> StepOutput:
        with phase("loss"):
            image, text, scale, bias = engine.call("heads", features.image, features.text)
            rows = LossInput(
                image=image,
                text=text,
                ids=fed.match_ids,
                scale=scale,
                bias=bias,
                step=step.number,
                is_logged=step.is_measured,
                labels=fed.labels,
            )
            if beside:
                rows, features = parted(rows, features, batch, beside)
            for part in parts:
                rows = part.inputs(rows, features, batch)
            return StepOutput(rows, learner.objective(rows))

    sequences = any(part.reads_tokens for part in parts)
    is_chunked = batch.mask is not None and learner.micro_rows < len(batch)
    chunk_rows = learner.micro_rows if is_chunked else None
    output = _gradients(engine, fed, chunk_rows, sequences, compute_loss)
    for part in parts:
        part.pull(step)
    outcome = agree(engine, learner.peers, batch, output, step)
    rows = _detached(output.rows)
    if engine.decides_on_device and all(part.may_follow_unasked for part in parts):
        _update_unasked(engine, outcome, step, parts, rows, batch)
        return Launched(outcome, rows, _without_pixels(batch))
    record = outcome.record()
    if record.applied:
        with phase("optimizer"):
            engine.apply(step.factor, record.grad_norm["total"])
        for part in parts:
            part.follow(rows, batch)
    else:
        engine.skip_update()
    return Launched(record, rows, _without_pixels(batch))


def _update_unasked(
    engine: Engine,
    outcome: Outcome,
    step: Step,
    parts: Sequence[Part],
    rows: LossInput,
    batch: Batch,
) -> None:
    """Update where what is on the device says so, without asking it."""
    applied = outcome.applied()
    with phase("optimizer"):
        engine.apply(step.factor, outcome.total_norm(), applied)
    for part in parts:
        if part.follows_on_device:
            part.follow(rows, batch, applied)


def _gradients(
    engine: Engine,
    batch: Batch,
    chunk_rows: int | None,
    sequences: bool,
    compute_loss: Callable[[Features], StepOutput],
) -> StepOutput:
    """Forward and backward of the whole batch, in chunks where it does not fit."""
    engine.begin_update()
    if chunk_rows is not None:
        return forward_backward(engine, batch, chunk_rows, sequences, compute_loss)
    features = (
        Features(batch.image, batch.tokens)
        if batch.mask is None
        else encode_rows(engine, batch, slice(None), sequences)
    )
    output = compute_loss(features)
    with phase("backward"):
        engine.backward(output.loss.total, last=True)
    return output


def _detached(rows: LossInput) -> LossInput:
    """What parts may keep: the loss has its graph no longer."""
    image, text = _without_graph(rows.image), _without_graph(rows.text)
    return replace(rows, image=image, text=text, bank=None, beside={})


def _without_pixels(batch: Batch) -> Batch:
    """The batch with one zero in the place of all its pixels."""
    return replace(batch, image=batch.image.new_zeros(()).expand(batch.image.shape))


def _without_graph(rows: Embeddings) -> Embeddings:
    return Embeddings(rows.raw.detach(), rows.projected.detach(), rows.unit.detach())


@dataclass(frozen=True)
class _Flight:
    """An update on its way.

    Attributes:
        position: Of the data after it.
        waited: Seconds for its batch.
        phases: Where its time went, where it is logged.
    """

    launched: Launched
    step: Step
    position: Position
    waited: float
    phases: PhaseClock


@dataclass(frozen=True)
class Arrival:
    """An update whose record has arrived.

    Attributes:
        step: What it was.
        result: What it gave.
        position: Of the data after it.
        spent: Seconds by phase where it is logged; `data`: waiting for its batch, `step`: since
            the record before it was done with.
    """

    step: Step
    result: StepResult
    position: Position
    spent: dict[str, float]


class Flights:
    """The updates of a stage in their order, at most two of them under way.

    Attributes:
        ahead: What the run is at after the newest launch; how many updates were applied and how
            many rows damaged is known only of those that have arrived.
    """

    def __init__(self, learner: Learner, state: RunState):
        self._learner = learner
        self._flying: deque[_Flight] = deque()
        self._clock = time.perf_counter()
        self.ahead = state

    def launch(
        self, batch: Batch, step: Step, parts: Sequence[Part], position: Position, waited: float
    ) -> None:
        """Train on a batch. Collective."""
        phases = PhaseClock(self._learner.engine.device)
        with phases.timing(step.is_logged):
            launched = launch(self._learner, batch, step, parts)
        self._flying.append(_Flight(launched, step, position, waited, phases))
        self.ahead = replace(self.ahead, step=self.ahead.step + 1, position=position)

    def arrived(self) -> Iterator[Arrival]:
        """Those whose records are to be looked at now, which waits for them."""
        newest = self._flying[-1]
        awaited = newest.launched.is_known or newest.step.waits
        while self._flying and (awaited or len(self._flying) > 1):
            flight = self._flying.popleft()
            result = flight.launched.result(overtaken=bool(self._flying))
            yield Arrival(flight.step, result, flight.position, self._spent(flight))
            # Every rank leaves after the same update, and all that was launched belongs to it.
            awaited = awaited or result.record.stop
            self._clock = time.perf_counter()

    def _spent(self, flight: _Flight) -> dict[str, float]:
        if not flight.step.is_logged:
            return {}
        seconds = flight.phases.seconds()
        # A batch that came while the device was at the update before kept nothing waiting.
        computed = sum(seconds.values())
        step = max(time.perf_counter() - self._clock, computed)
        return {"data": min(flight.waited, step - computed), "step": step, **seconds}
