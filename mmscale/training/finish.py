"""The end of a run: last evaluation and checkpoint, the doctor's verdict, and the page."""

import json
from collections.abc import Sequence
from typing import Any

from mmscale.checkpoint.state import RunState
from mmscale.diagnostics.doctor import InTraining
from mmscale.diagnostics.forgetting import Forgetting
from mmscale.diagnostics.of_run import Course, diagnose_run
from mmscale.diagnostics.pairs import Pairs
from mmscale.errors import Stop, TerminatedError
from mmscale.outputs import replace_file
from mmscale.report.examples import choose_examples
from mmscale.report.metrics import read_metrics
from mmscale.report.page import write_page
from mmscale.report.verdicts import verdict_of
from mmscale.training.deliver import deliver
from mmscale.training.part import Part
from mmscale.training.parts.checkpoints import Checkpoints
from mmscale.training.parts.evaluation import Evaluation
from mmscale.training.stage import Services, Stage


def finish(stage: Stage, services: Services, parts: Sequence[Part], state: RunState) -> None:
    """Evaluate, save, diagnose and draw. Collective.

    Raises:
        TerminatedError: The run was told to stop; a checkpoint is written.
    """
    (evaluation,) = (part for part in parts if isinstance(part, Evaluation))
    try:
        pairs = evaluation.evaluate(state)
    except Stop:
        # Started again the run makes this evaluation, and ends.
        _save_last(stage, services, parts, state)
        raise TerminatedError(
            f"told to stop; step {state.step} is in a checkpoint, and the evaluation at the end is "
            "made when the same command runs again"
        ) from None
    _save_last(stage, services, parts, state)
    delivered = deliver(stage, services, state)
    # A blend within its budget has forgotten no more than it may.
    forgetting = None if delivered else Forgetting.of(evaluation.metrics, stage.config.retain)
    if stage.job.world.is_main:
        with services.stop.at_once():
            last: dict[str, Any] = {"step": state.step, **evaluation.metrics}
            if pairs is not None:
                last["verdict"] = _diagnose(stage, services, state, pairs, forgetting)
            _tell_the_end(stage, services, last)


def _save_last(stage: Stage, services: Services, parts: Sequence[Part], state: RunState) -> None:
    (checkpoints,) = (part for part in parts if isinstance(part, Checkpoints))
    # A run of no steps keeps what it began with.
    if state.step > stage.start.state.step or state.step == 0:
        checkpoints.save(state)
    services.saver.finish()


def _tell_the_end(stage: Stage, services: Services, last: dict[str, Any]) -> None:
    """The last line and the page, on the main rank."""
    report, folder = services.report, stage.job.folder
    report.finish(last)
    if stage.config.log.page:
        page = write_page(folder)
        report.page(page)
        report.say(f"report: {page.path}")


def _diagnose(
    stage: Stage,
    services: Services,
    state: RunState,
    pairs: Pairs,
    forgetting: Forgetting | None,
) -> str:
    """Write the doctor's verdict and the page's examples; returns the verdict."""
    report, folder, held_out = services.report, stage.job.folder, stage.held_out
    own = InTraining.last_of(read_metrics(folder / "metrics.jsonl"))
    course = Course(stage.config, state.updates, state.samples, state.position.epoch, forgetting)
    diagnosis = diagnose_run(pairs, course, own)
    content = diagnosis.to_json()
    replace_file(folder / "doctor.json", json.dumps(content, indent=1).encode())
    report.say(f"verdict: {diagnosis.verdict} (confidence {diagnosis.confidence:.2f})")
    report.say(verdict_of(content).sentence)
    if stage.config.log.page:
        assert held_out is not None, "there are pairs"
        choose_examples(pairs, held_out.shards, report.warn).write(folder)
    return diagnosis.verdict
