"""Clusters of the training images for the prototypes term, made anew each epoch.

What is clustered is what the momentum encoder saw of each image last, at most an epoch ago: rows
that the updates encode anyway, instead of another pass over the data. The first epoch has none.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mmscale.config.loss import PrototypesTerm
from mmscale.contracts import (
    Batch,
    Features,
    LossInput,
    NamedTensor,
    Peers,
    Prototypes,
    World,
)
from mmscale.errors import ConfigError
from mmscale.loss.prototypes import Clustering, cluster
from mmscale.parallel.peers import broadcast_object
from mmscale.training.part import Part, Step

_PARTS = ("centres", "temperature", "ids", "cluster")


class EpochClusters(Part):
    """The latest row of each image, and the clusters of the epoch; equal on every rank.

    Rank 0 clusters for all: unlike machines may round to another nearest centre.
    """

    name = "prototypes"
    has_tensors = True

    def __init__(
        self,
        term: PrototypesTerm,
        images: int,
        steps: int,
        seed: int,
        world: World,
        peers: Peers,
        device: torch.device,
    ):
        """Without rows or clusters.

        Args:
            term: How many clusters, and their temperature.
            images: Of the training set.
            steps: Updates an epoch.
            seed: `run.seed`.
            world: The ranks that share the clusters.
            peers: The same ranks.
            device: Where they are made.

        Raises:
            ConfigError: There are not more images than clusters.
        """
        if max(term.clusters) >= images:
            raise ConfigError(
                f"loss.terms: prototypes with clusters={max(term.clusters)} needs more images than "
                f"the {images} of data.train; lower it"
            )
        self._term, self._steps, self._seed = term, steps, seed
        self._world, self._peers, self._device = world, peers, device
        self._rows = torch.zeros(0, 0)
        self._slots: dict[int, int] = {}
        self._found: tuple[Clustering, ...] = ()
        self._begun = 0

    def before(self, step: Step, batch: Batch) -> None:
        self.cluster_anew(step.number)

    def inputs(self, rows: LossInput, features: Features, batch: Batch) -> LossInput:
        return replace(rows, prototypes=self.of(batch.match_ids))

    def follow(self, rows: LossInput, batch: Batch, applied: Tensor | None = None) -> None:
        if rows.momentum_image is not None:
            columns = self._peers.columns
            self.add(columns(rows.momentum_image), columns(batch.match_ids))

    def cluster_anew(self, step: int) -> None:
        """Cluster anew at each epoch's end, once a whole epoch has been seen. Collective.

        A stage may begin within an epoch: few images would have a row then.

        Args:
            step: Updates taken.
        """
        self._begun += 1
        if self._begun > self._steps and step % self._steps == 0:
            made = self._make(step) if self._world.is_main else None
            self._found = _clusterings(broadcast_object(self._world, made), self._device)

    def of(self, ids: Int64[Tensor, " b"]) -> tuple[Prototypes, ...]:
        """What the loss needs for a rank's rows, one entry a number of clusters; () at first."""
        return tuple(found.of(ids) for found in self._found)

    def add(self, image: Float[Tensor, "n d"], ids: Int64[Tensor, " n"]) -> None:
        """Take the momentum encoder's rows of a global batch."""
        last = {identity: row for row, identity in enumerate(ids.tolist())}
        slots = [self._slots.setdefault(identity, len(self._slots)) for identity in last]
        missing = len(self._slots) - len(self._rows)
        if missing > 0:
            more = image.new_zeros(max(missing, len(self._rows)), image.shape[1], device="cpu")
            self._rows = torch.cat([self._rows, more]) if len(self._rows) else more
        self._rows[slots] = image.cpu()[list(last.values())]

    def tensors(self) -> Iterator[NamedTensor]:
        kept = {"rows": self._rows[: len(self._slots)], "row_ids": self._ids()}
        kept["begun"] = torch.tensor([self._begun])
        for name, tensor in (kept | _tensors(self._found)).items():
            yield NamedTensor(f"{self.name}.{name}", tensor, {})

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._rows, self._begun = tensors["rows"].clone(), int(tensors["begun"])
        self._slots = {identity: s for s, identity in enumerate(tensors["row_ids"].tolist())}
        self._found = _clusterings(tensors, self._device)

    def _ids(self) -> Int64[Tensor, " images"]:
        return torch.tensor(list(self._slots), dtype=torch.long)

    def _make(self, step: int) -> dict[str, Tensor]:
        rows = self._rows[: len(self._slots)].to(self._device)
        ids, term = self._ids().to(self._device), self._term
        seed = self._seed * 1_000_003 + step
        made = (cluster(rows, ids, count, term.temperature, seed) for count in term.clusters)
        return {name: tensor.cpu() for name, tensor in _tensors(tuple(made)).items()}


def _tensors(found: tuple[Clustering, ...]) -> dict[str, Tensor]:
    return {
        f"{place}.{part}": getattr(one, part) for place, one in enumerate(found) for part in _PARTS
    }


def _clusterings(tensors: Mapping[str, Tensor], device: torch.device) -> tuple[Clustering, ...]:
    count = sum(name.endswith(".centres") for name in tensors)
    return tuple(
        Clustering(*(tensors[f"{place}.{part}"].to(device) for part in _PARTS))
        for place in range(count)
    )
