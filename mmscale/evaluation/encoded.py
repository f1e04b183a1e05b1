"""Whole sets through the towers with a run's settings: cached, held out, or compared.

Outputs of frozen towers are computed once and kept. A file's name is a digest of the shards, of
what their manifests say of the samples, of the towers' weights and how they are fed, so that a
stale one is never used.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from mmscale.config.data import DataConfig
from mmscale.config.evaluation import MAIN, EvalSetConfig, setting_of
from mmscale.config.schema import Config
from mmscale.contracts import InputSpec, Peers, World
from mmscale.data.arrange import Neighbours
from mmscale.data.decoded_cache import make_room
from mmscale.data.features import FeatureTable, KeptParts
from mmscale.data.first_look import first_look
from mmscale.data.intake import Intake
from mmscale.data.shards import ShardSet, open_shards
from mmscale.engine.encode import Encoder, encode
from mmscale.errors import DataError
from mmscale.evaluation.classes import ClassSet, open_classes
from mmscale.model.two_tower import TwoTower
from mmscale.outputs import require_folder, writing
from mmscale.parallel.peers import barrier, broadcast_object, gather_objects

Tell = Callable[[str], None]

# Between two lines of a pass through the towers.
TOLD_SECONDS = 10.0
# Cleaning, splitting and cutting that differ show in the tokens of these.
_PROBES = ("a photograph of two dogs, running", "  A  Caf\u00c3\u00a9 &amp;amp; B's T-shirt_! ")


@dataclass(frozen=True)
class HeldOut:
    """Pairs that a run is evaluated on; `table`: their features, where towers are frozen."""

    shards: ShardSet
    spec: InputSpec
    table: FeatureTable | None


EvalSet: TypeAlias = HeldOut | ClassSet


def open_sets(config: Config, spec: InputSpec) -> dict[str, EvalSet]:
    """Every set that a run is evaluated on, by name: `data.eval` is `main`.

    Raises:
        DataError: A set has no shard, no manifest, no image, or a label that is no class of it.
    """
    places = {MAIN: EvalSetConfig(data=config.data.eval)} if config.data.eval else {}
    return {
        name: _open_set(name, chosen, spec, config.data)
        for name, chosen in (places | config.eval.sets).items()
    }


def _open_set(name: str, chosen: EvalSetConfig, spec: InputSpec, data: DataConfig) -> EvalSet:
    if chosen.kind == "classes":
        keeps = data.feature_cache is not None
        return open_classes(f"eval.sets.{name}.", chosen, spec, keeps)
    setting = setting_of(name)
    try:
        shards = open_shards(setting, chosen.data, intake=Intake.of(data, setting))
        return HeldOut(shards, spec, None)
    except DataError as error:
        if name == MAIN:
            raise
        raise DataError(
            f"{error}; a set of images without captions, but with labels, is of kind: classes"
        ) from error


def encoded_sets(
    config: Config,
    model: TwoTower,
    encoder: Encoder,
    shards: ShardSet,
    tell: Tell,
) -> tuple[FeatureTable | None, dict[str, EvalSet]]:
    """Cached features of the training set, and every evaluation set by name."""
    sets = open_sets(config, encoder.spec)
    held_out = {setting_of(n): one.shards for n, one in sets.items() if isinstance(one, HeldOut)}
    for line in first_look(config.data.match, shards, held_out):
        tell(line)
    if config.data.feature_cache is None:
        return None, sets
    limit = config.data.cache_gb * 1e9
    cache = FeatureCache(Path(config.data.feature_cache), model, encoder.spec, limit)

    def table(which: ShardSet) -> FeatureTable:
        return cached_table(cache, which, encoder, tell)

    def cached(held_out: EvalSet) -> EvalSet:
        if isinstance(held_out, ClassSet):
            # It keeps what the towers give at its first evaluation.
            return held_out
        return replace(held_out, table=table(held_out.shards))

    return table(shards), {name: cached(held_out) for name, held_out in sets.items()}


def cached_table(
    cache: "FeatureCache", shards: ShardSet, encoder: Encoder, tell: Tell
) -> FeatureTable:
    """A set's table out of a cache, computed where it is not there yet. Collective."""

    def make(kept: KeptParts) -> FeatureTable:
        tell(f"features: {shards.samples:,} images through the frozen towers, once")
        if kept.count:
            tell(f"features: {kept.count:,} images are there from a pass that was cut short")
        return encode(encoder, shards, pace_of_features(tell), kept)

    return cache.table(shards, encoder.peers, make)


def own_neighbours(
    encoder: Encoder,
    shards: ShardSet,
    features: FeatureTable | None,
    by: str,
    world: World,
    tell: Tell,
) -> Neighbours:
    """The training set's nearest images by the model as it is now. Collective.

    Args:
        encoder: Calls the model.
        shards: The training set.
        features: Its cached tower outputs; None makes them.
        by: `image`, or `text` for the mean of an image's captions.
        world: The ranks; all get the main one's table.
        tell: Takes lines about how far it is.
    """
    device = encoder.device
    if features is None:
        features = encode(encoder, shards, pace_of_features(tell))
    image, text, *_ = encoder.call("heads", features.image.to(device), features.text.to(device))
    embedded = replace(features, image=image.unit.float().cpu(), text=text.unit.float().cpu())
    table = embedded.neighbours(by).tensors() if world.is_main else None
    return Neighbours.of(broadcast_object(world, table))


def pace_of_features(tell: Tell) -> Callable[[int, int], None]:
    """Progress that speaks every ten seconds and at the end, with the rate and the time left."""
    # What an earlier pass has left counts neither for the rate nor for the time.
    begun: tuple[float, int] | None = None
    told = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal begun, told
        now = time.monotonic()
        start, first = begun = begun or (now, done)
        if now - told < TOLD_SECONDS and done < total:
            return
        told = now
        line = f"features: {done:,} of this rank's {total:,} images"
        if done > first and now > start:
            rate = (done - first) / (now - start)
            left = timedelta(seconds=round((total - done) / rate))
            line += f", {rate:,.1f}/s, {left} left"
        tell(line)

    return progress


class FeatureCache:
    """Feature tables of one pair of towers in one folder.

    Args:
        folder: Shared by all runs.
        model: The towers.
        spec: How they are fed.
        limit: Most bytes in the folder; tables used longest ago go first. Those of this run stay.
        setting: That names the folder.
    """

    def __init__(
        self,
        folder: Path,
        model: TwoTower,
        spec: InputSpec,
        limit: float,
        setting: str = "data.feature_cache",
    ):
        self._folder, self._limit, self._setting = folder, limit, setting
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
        if not all(gather_objects(peers, path.exists())):
            if peers.rank == 0:
                require_folder(self._setting, self._folder)
            kept = KeptParts(self._folder, digest)
            made = make(kept)
            if peers.rank == 0:
                with writing(self._setting, self._folder):
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
    add_feeding(digest, spec)
    for side, tower in (("vision", model.vision), ("text", model.text)):
        add_module(digest, side, tower)
    return digest.hexdigest()


def add_feeding(digest: Any, spec: InputSpec) -> None:
    """How pictures and captions reach a model, to a digest of `hashlib`."""
    pixels = [spec.image_size, spec.mean, spec.std, spec.interpolation, spec.resize]
    feeding = [*pixels, spec.context_length]
    digest.update(json.dumps([feeding, spec.tokenize(_PROBES), spec.pad_token]).encode())


def add_module(digest: Any, name: str, module: nn.Module) -> None:
    """What a module is, and its tensors, to a digest of `hashlib`."""
    digest.update(f"{name}: {module}".encode())
    add_tensors(digest, module)


def add_tensors(digest: Any, module: nn.Module) -> None:
    """A module's tensors alone: how a library prints the module may change."""
    for tensor_name, tensor in module.state_dict().items():
        digest.update(tensor_name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
