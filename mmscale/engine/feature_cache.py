"""Outputs of frozen towers, computed once and kept; a stale file is never used.

A file's name is a digest of the shards, of what their manifests say of the samples, of the towers'
weights and how they are fed.
"""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from mmscale.contracts import InputSpec, Peers
from mmscale.data.decoded_cache import make_room
from mmscale.data.features import FeatureTable, KeptParts
from mmscale.data.shards import ShardSet
from mmscale.model.two_tower import TwoTower
from mmscale.outputs import require_folder, writing
from mmscale.parallel.peers import barrier, from_all

_SETTING = "data.feature_cache"
# Cleaning, splitting and cutting that differ show in the tokens of these.
_PROBES = ("a photograph of two dogs, running", "  A  Caf\u00c3\u00a9 &amp;amp; B's T-shirt_! ")


class FeatureCache:
    """Feature tables of one pair of towers in one folder.

    Args:
        folder: Shared by all runs.
        model: The towers.
        spec: How they are fed.
        limit: Most bytes in the folder; tables used longest ago go first. Those of this run stay.
    """

    def __init__(self, folder: Path, model: TwoTower, spec: InputSpec, limit: float):
        self._folder, self._limit = folder, limit
        self._towers = _towers_digest(model, spec)
        self._in_use: set[Path] = set()

    def table(
        self, shards: ShardSet, peers: Peers, make: Callable[[KeptParts], FeatureTable]
    ) -> FeatureTable:
        """The set's table, made by `make` where it is not kept yet. Collective.

        Args:
            shards: The set.
            peers: The ranks.
            make: Gets what an earlier pass has left, and leaves there what a later one can use.
        """
        facts = f"{self._towers}/{shards.digest}/{shards.described}"
        digest = hashlib.sha256(facts.encode()).hexdigest()[:32]
        path = self._folder / f"{digest}.safetensors"
        self._in_use.add(path)
        # Every rank must take the same way, also where one sees a shared folder late.
        if not all(from_all(peers, path.exists())):
            if peers.rank == 0:
                require_folder(_SETTING, self._folder)
            kept = KeptParts(self._folder, digest)
            made = make(kept)
            if peers.rank == 0:
                with writing(_SETTING, self._folder):
                    made.save(path)
            barrier()
            kept.remove()
        table = FeatureTable.load(path)
        if peers.rank == 0:
            # Its last use, for whoever has to make room; a folder to be read only keeps none.
            with suppress(OSError):
                os.utime(path)
            make_room(
                self._folder,
                "*.safetensors",
                self._limit,
                0,
                lambda other, used: other not in self._in_use,
            )
        return table


def _towers_digest(model: TwoTower, spec: InputSpec) -> str:
    """What the outputs depend on, besides the data."""
    digest = hashlib.sha256()
    feeding = [spec.image_size, spec.mean, spec.std, spec.interpolation, spec.context_length]
    digest.update(json.dumps([feeding, spec.tokenize(_PROBES), spec.pad_token]).encode())
    for side, tower in (("vision", model.vision), ("text", model.text)):
        digest.update(f"{side}: {tower}".encode())
        for name, tensor in tower.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
