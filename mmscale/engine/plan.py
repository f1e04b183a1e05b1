"""Batch arithmetic: how one global batch is cut over ranks, chunks and lanes."""

from collections.abc import Sequence
from dataclasses import dataclass

from mmscale.config.deepspeed import zero_stage
from mmscale.config.rules import expanded_stages
from mmscale.config.schema import Config
from mmscale.config.taught import AnchorTerm
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


def is_zero_3(config: Config, kind: str) -> bool:
    """Whether weights are whole only while they are used; `kind` as `engine_kind` says."""
    return kind == "deepspeed" and zero_stage(config.engine.deepspeed) == 3


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


def held_rows(config: Config, world: int) -> dict[str, int]:
    """Rows that pass the model on each rank beside the batch's, by the `data` of anchors.

    Raises:
        ConfigError: Ranks cannot share them alike, or two terms want different numbers of one set.
    """
    found: dict[str, int] = {}
    for term in config.loss.terms:
        if not isinstance(term, AnchorTerm) or term.data is None:
            continue
        named, rows = f"loss.terms holds anchor with data={term.data}", term.given_rows
        if rows % world:
            raise ConfigError(
                f"{named} and rows={rows}, which {world} ranks cannot share alike; give a multiple "
                f"of {world}"
            )
        if found.setdefault(term.data, rows // world) != rows // world:
            raise ConfigError(f"{named} more than once, with different rows; give one number")
    return found


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


def stage_lengths(run: Config, stages: Sequence[Config], items: int) -> list[int]:
    """Updates of each stage; the last one lasts until the run has seen all of its rows.

    Args:
        run: The whole run.
        stages: The configuration of each stage; of a run without stages, its own.
        items: Turns of samples in an epoch.

    Raises:
        ConfigError: The stages before the last leave no room for it, or together exceed the run.
    """

    def epoch_steps(config: Config) -> int:
        return items // (config.train.global_batch_size // config.data.rows_per_item)

    total = run.train.duration.steps(epoch_steps(run), run.train.global_batch_size)
    parts = expanded_stages(run)
    if not parts:
        return [total]
    sizes = [config.train.global_batch_size for config in stages]
    lengths = [
        part.duration.steps(epoch_steps(config), size)
        for part, config, size in zip(parts, stages, sizes, strict=True)
    ]
    rows = total * run.train.global_batch_size
    taken = [length * size for length, size in zip(lengths, sizes, strict=True)]
    room = rows
    if run.train.duration.unit == "epochs":
        # A stage with another batch leaves out another part of each epoch.
        room = max(rows, int(run.train.duration.amount * items * run.data.rows_per_item))
    # A part of a batch at each stage's end is rounding, not a contradiction.
    if sum(taken) > room + sum(sizes) or sum(taken[:-1]) >= rows:
        wanted = " + ".join(f"{name.duration} ({name.name})" for name in parts)
        raise ConfigError(
            f"stages: {wanted} are {sum(taken):,} rows, more than the {rows:,} of train.duration="
            f"{run.train.duration}; shorten a stage or raise train.duration"
        )
    left = -(-(rows - sum(taken[:-1])) // sizes[-1])
    return [*lengths[:-1], max(lengths[-1], left)]
