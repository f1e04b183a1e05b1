"""Whole sets through the towers with a run's settings: cached, held out, or compared."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from mmscale.config.schema import Config
from mmscale.contracts import InputSpec, World
from mmscale.data.arrange import Neighbours
from mmscale.data.features import FeatureTable, KeptParts
from mmscale.data.grouping import copies_line
from mmscale.data.shard_set import place_of
from mmscale.data.shards import ShardSet, open_shards
from mmscale.engine.encode import Encoder, encode
from mmscale.engine.feature_cache import FeatureCache
from mmscale.model.two_tower import TwoTower
from mmscale.parallel.peers import from_main

Tell = Callable[[str], None]


@dataclass(frozen=True)
class HeldOut:
    """The pairs that a run is evaluated on; `table`: their features, where towers are frozen."""

    shards: ShardSet
    spec: InputSpec
    table: FeatureTable | None


def _shared(train: ShardSet, held_out: ShardSet) -> str | None:
    """What is told where a run is evaluated on shards that it trains on."""
    trained = {place_of(path) for path in train.paths}
    same = sum(place_of(path) in trained for path in held_out.paths)
    if not same:
        return None
    return (
        f"data.eval: {same} of its {len(held_out.paths)} shards are in data.train too; recalls and "
        "verdicts are not of held-out pairs"
    )


def encoded_sets(
    config: Config,
    model: TwoTower,
    encoder: Encoder,
    shards: ShardSet,
    tell: Tell,
) -> tuple[FeatureTable | None, HeldOut | None]:
    """Cached features of the training set, and the held-out pairs."""
    spec = encoder.spec
    held_out = open_shards("data.eval", config.data.eval) if config.data.eval else None
    if config.data.match == "image" and (line := _copies("data.train", shards)):
        tell(line)
    if held_out and (line := _copies("data.eval", held_out)):
        tell(line)
    if held_out and (line := _shared(shards, held_out)):
        tell(line)
    if config.data.feature_cache is None:
        return None, HeldOut(held_out, spec, None) if held_out else None
    limit = config.data.cache_gb * 1e9
    cache = FeatureCache(Path(config.data.feature_cache), model, spec, limit)

    def table(which: ShardSet) -> FeatureTable:
        def make(kept: KeptParts) -> FeatureTable:
            tell(f"features: {which.samples:,} images through the frozen towers, once")
            if kept.count:
                tell(f"features: {kept.count:,} images are there from a pass that was cut short")
            return encode(encoder, which, _tenths(tell), kept)

        return cache.table(which, encoder.peers, make)

    return table(shards), HeldOut(held_out, spec, table(held_out)) if held_out else None


def _copies(setting: str, shards: ShardSet) -> str | None:
    return copies_line(setting, shards.copies, shards.samples)


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
        features = encode(encoder, shards, _tenths(tell))
    image, text, *_ = encoder.call("heads", features.image.to(device), features.text.to(device))
    embedded = replace(features, image=image.unit.float().cpu(), text=text.unit.float().cpu())
    table = embedded.neighbours(by).tensors() if world.is_main else None
    return Neighbours.of(from_main(world, table))


def _tenths(tell: Tell) -> Callable[[int, int], None]:
    """Progress that speaks at each tenth."""
    told = 0

    def progress(done: int, total: int) -> None:
        nonlocal told
        if 10 * done // total > told:
            told = 10 * done // total
            tell(f"features: {done:,} of this rank's {total:,} images done")

    return progress
