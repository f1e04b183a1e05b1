"""The end of a run with a budget: the best blend of its first and its last weights.

The ends are read from their checkpoints, whole on every rank, so that the line is the same
whatever engine trained.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict

from mmscale.checkpoint.files import best_blend, step_folder
from mmscale.checkpoint.state import RunState
from mmscale.evaluation.blend import Blendable, blend, open_all, write_blend
from mmscale.evaluation.retention import Point, best_point, walked
from mmscale.evaluation.sets import Evaluated, evaluate_sets
from mmscale.evaluation.trained import Trained
from mmscale.outputs import replace_file
from mmscale.parallel.peers import barrier
from mmscale.report.retention import LINE_NAME
from mmscale.training.parts.retention import start_in
from mmscale.training.stage import Services, Stage


def deliver(stage: Stage, services: Services, state: RunState) -> Point | None:
    """Walk the line and write the best point within `retain.budget`, if one is set. Collective.

    Args:
        stage: The run's last; both ends are on disk.
        services: Told what is found.
        state: What the run is at.
    """
    settings, job = stage.config.retain, stage.job
    if not settings.sets or settings.budget is None or state.step == 0:
        return None
    barrier()
    models = open_all([step_folder(job.folder, step) for step in (0, state.step)])
    points = []
    for point in _line(stage, services, models):
        points.append(point)
        services.report.say(f"{point.share:.0%} of the last weights: {point}")
    best = best_point(points, settings.budget)
    if job.world.is_main:
        shares = (1 - best.share, best.share)
        write_blend(best_blend(job.folder), models, shares, blend(models, shares))
        found = {
            "budget": settings.budget,
            "metric": settings.metric,
            "sets": list(settings.sets),
            "chosen": best.share,
            "points": [asdict(point) for point in points],
        }
        replace_file(job.folder / LINE_NAME, json.dumps(found, indent=1).encode())
    services.report.say(
        f"within {settings.budget:g} points: {best.share:.0%} of the last weights: {best}; it is "
        f"{best_blend(job.folder)}"
    )
    return best


def _line(stage: Stage, services: Services, models: list[Blendable]) -> Iterator[Point]:
    first = start_in(step_folder(stage.job.folder, 0))

    def alive(done: int, total: int) -> None:
        services.watchdog.alive(f"a point between the run's ends after {done} of {total}")

    def evaluate(trained: Trained) -> Mapping[str, Evaluated]:
        call, device = trained.inference.call, trained.inference.device
        return evaluate_sets(stage.config, call, device, stage.sets, stage.learner.peers, alive)

    return walked(models, stage.config.retain, evaluate, first)
