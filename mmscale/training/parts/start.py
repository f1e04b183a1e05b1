"""The start: the weights that the run began with, whole and frozen, for terms that stay near them.

They are those before the first update of the first stage, fitted heads included. Every checkpoint
holds them, so that a run that goes on elsewhere stays near the same place.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from mmscale.contracts import START, InputSpec, NamedTensor
from mmscale.engine.ema import copy_of
from mmscale.errors import CheckpointError
from mmscale.model.two_tower import TwoTower
from mmscale.training.part import Part
from mmscale.training.stage import Start
from mmscale.training.teachers import Teacher


class Begun(Part):
    """Gives the start to every checkpoint; its weights are filled before the part is built."""

    name = "start"

    def __init__(self, teacher: Teacher):
        """Keep a model.

        Args:
            teacher: The start.
        """
        self._model = teacher.model

    def tensors(self) -> Iterator[NamedTensor]:
        for name, value in self._model.state_dict().items():
            yield NamedTensor(f"{self.name}.{name}", value, {})


def begun(model: TwoTower, spec: InputSpec, width: int, start: Start) -> Teacher:
    """The model as the run began, as one more teacher.

    Args:
        model: As the stage begins with it, whole, before an engine takes it.
        spec: What it is fed.
        width: Of its embeddings.
        start: Where the stage begins: the run itself where it holds no weights of an update.

    Raises:
        CheckpointError: The run goes on from a checkpoint that does not hold its start.
    """
    # A whole copy: what is frozen now another stage may have trained.
    copied = copy_of(model, share_frozen=False)
    assert isinstance(copied, TwoTower), "a copy is of its original's class"
    kept = start.begun
    if start.checkpoint is not None:
        kept = start.checkpoint.tensors_of(Begun.name)
    if kept is not None:
        _fill(copied, kept)
    return Teacher(START, copied, spec, width, "")


def _fill(model: nn.Module, kept: Mapping[str, Tensor]) -> None:
    own = model.state_dict()
    if own.keys() != kept.keys():
        differing = sorted(own.keys() ^ kept.keys())
        raise CheckpointError(
            f"the start that the checkpoint keeps is another model: {len(differing)} tensors "
            f"differ, the first {differing[0]}; start another run.dir"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(kept[name])
