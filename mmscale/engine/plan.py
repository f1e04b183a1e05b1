"""Batch arithmetic: how one global batch is cut over ranks, chunks and lanes."""

from dataclasses import dataclass

from mmscale.config.schema import Config
from mmscale.contracts import World
from mmscale.errors import ConfigError


@dataclass(frozen=True)
class BatchPlan:
    """One global batch.

    Attributes:
        world: Ranks.
        rank_rows: Rows a rank contributes.
        micro_rows: Rows a rank forwards at once.
        lanes: Sub-streams of the data; each gives `global_rows / lanes` rows to every batch.
    """

    world: int
    rank_rows: int
    micro_rows: int
    lanes: int

    @property
    def chunks(self) -> int:
        """Forwards a rank needs for its rows."""
        return self.rank_rows // self.micro_rows

    @property
    def global_rows(self) -> int:
        """Pairs contrasted together."""
        return self.world * self.rank_rows

    def __str__(self) -> str:
        return (
            f"{self.world} rank{'s' * (self.world > 1)} x {self.micro_rows} rows x {self.chunks} "
            f"chunk{'s' * (self.chunks > 1)} = {self.global_rows:,} pairs, "
            f"each contrasted with {self.global_rows - 1:,} others; {self.lanes} lanes"
        )


def engine_kind(config: Config, world: World) -> str:
    """`deepspeed` or `accelerate`."""
    if config.engine.kind != "auto":
        return config.engine.kind
    sharded = config.engine.deepspeed is not None or world.launcher == "deepspeed"
    return "deepspeed" if sharded else "accelerate"


def plan_batch(config: Config, world: int) -> BatchPlan:
    """Cut the global batch.

    Raises:
        ConfigError: Something does not divide; names the nearest values that do.
    """
    total, micro = config.train.global_batch_size, config.train.micro_batch_size
    if total % world:
        raise ConfigError(
            f"train.global_batch_size={total} is not a multiple of {world} ranks; "
            f"nearest: {_nearest(total, world)}"
        )
    rank_rows = total // world
    micro_rows = rank_rows if micro == "auto" else micro
    if rank_rows % micro_rows:
        raise ConfigError(
            f"train.global_batch_size={total} is not a multiple of {world} ranks x "
            f"train.micro_batch_size={micro_rows} = {world * micro_rows}; "
            f"nearest: {_nearest(total, world * micro_rows)}"
        )
    return BatchPlan(world, rank_rows, micro_rows, _lanes(config, world))


def _lanes(config: Config, world: int) -> int:
    total, lanes = config.train.global_batch_size, config.data.lanes
    group = config.data.rows_per_item
    if total % group:
        raise ConfigError(
            f"train.global_batch_size={total} is not a multiple of data.captions={group} rows an "
            f"image; nearest: {_nearest(total, group)}"
        )
    images = total // group
    fitting = [n for n in range(1, images + 1) if images % n == 0 and n % world == 0]
    if not fitting:
        raise ConfigError(
            f"train.global_batch_size={total} gives {images} images a batch, which {world} ranks "
            f"cannot share; nearest: {_nearest(total, group * world)}"
        )
    if lanes == "auto":
        # Lanes must not depend on the world, or the order of the rows would: the largest divisor
        # up to 64 serves every world that divides it; larger worlds need more lanes.
        usual = max(n for n in range(1, min(64, images) + 1) if images % n == 0)
        return usual if usual % world == 0 else min(fitting, key=lambda n: abs(n - 64))
    if lanes not in fitting:
        below, above = [n for n in fitting if n < lanes], [n for n in fitting if n > lanes]
        near = below[-1:] + above[:1]
        raise ConfigError(
            f"data.lanes={lanes} must divide the {images} images of a batch and be a multiple of "
            f"{world} ranks; nearest: {' or '.join(map(str, near))}"
        )
    return lanes


def _nearest(value: int, unit: int) -> str:
    below, above = value // unit * unit, -(-value // unit) * unit
    return f"{below} or {above}" if below else str(above)
