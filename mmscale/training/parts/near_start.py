"""The pull of the weights towards those that the run began with, in the engine's own shares.

Every rank holds its share of the start, cut as the engine cuts the weights, so that distance and
gradient ask nothing of other ranks.

Source: Li et al. 2018, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks"
    (arXiv 1802.01483), L2-SP; here over all trained parameters, new ones included.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mmscale.config.taught import L2StartTerm
from mmscale.config.values import StepsOf
from mmscale.contracts import Batch, Features, LossInput
from mmscale.engine.protocol import Engine
from mmscale.training.part import Part, Step


class NearStart(Part):
    """Gives `l2_start` its value, and the engine its gradient: 2 weight (w - w_0).

    The gradient comes after the last backward: it is added once, however many chunks and ranks
    there are, and norms and clipping see it.
    """

    name = "l2_start"

    def __init__(
        self,
        term: L2StartTerm,
        engine: Engine,
        start: Mapping[str, Tensor],
        world_size: int,
        steps_of: StepsOf,
    ):
        """Cut the start as the engine cuts its weights.

        Args:
            term: Its weight says when the distance is taken.
            engine: Holds the weights.
            start: The run's first weights, whole, by name.
            world_size: Ranks, over which the objective is averaged.
            steps_of: A duration in updates of this run.
        """
        self._term, self._engine = term, engine
        self._world_size, self._steps_of = world_size, steps_of
        self._start = {
            name: engine.cut(name, start[name]).to(own, copy=True) for name, own in engine.masters()
        }

    def inputs(self, rows: LossInput, features: Features, batch: Batch) -> LossInput:
        if not self._term.weight.at(rows.step, self._steps_of):
            return rows
        distance = rows.scale.new_zeros(())
        for _, apart in self._apart():
            distance = distance + apart.square().sum().to(distance)
        return replace(rows, distance=self._world_size * distance)

    def pull(self, step: Step) -> None:
        if weight := self._term.weight.at(step.number, self._steps_of):
            self._engine.pull(self._apart(), 2 * weight)

    @torch.no_grad()
    def _apart(self) -> Iterator[tuple[str, Tensor]]:
        for name, own in self._engine.masters():
            yield name, own - self._start[name]
