"""Outputs of frozen towers, computed once and kept; a stale file is never used.

A file's name is a digest of the shards, the towers' weights and how they are fed.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from mmscale.contracts import InputSpec, Peers
from mmscale.data.features import FeatureTable
from mmscale.data.shards import ShardSet
from mmscale.dist.peers import barrier


class FeatureCache:
    """Feature tables of one pair of towers in one folder."""

    def __init__(self, folder: Path, model: nn.Module, spec: InputSpec):
        self._folder = folder
        self._towers = _towers_digest(model, spec)

    def table(
        self, shards: ShardSet, peers: Peers, make: Callable[[], FeatureTable]
    ) -> FeatureTable:
        """The set's table, made by `make` where it is not kept yet. Collective."""
        digest = hashlib.sha256(f"{self._towers}/{shards.digest}".encode()).hexdigest()[:32]
        path = self._folder / f"{digest}.safetensors"
        # Every rank must take the same way, so all look before one writes.
        kept = path.exists()
        barrier()
        if not kept:
            made = make()
            if peers.rank == 0:
                made.save(path)
            barrier()
        return FeatureTable.load(path)


def _towers_digest(model: nn.Module, spec: InputSpec) -> str:
    """What the outputs depend on, besides the data."""
    digest = hashlib.sha256()
    feeding = [spec.image_size, spec.mean, spec.std, spec.interpolation, spec.context_length]
    probe = spec.tokenize(["a photograph of two dogs, running"])
    digest.update(json.dumps([feeding, probe, spec.pad_token]).encode())
    digest.update(str(model).encode())
    for name, tensor in model.state_dict().items():
        if name.startswith(("vision.", "text.")):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
