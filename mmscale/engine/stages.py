"""How long each stage of a run is, in updates."""

from collections.abc import Sequence

from mmscale.config.schema import Config
from mmscale.config.staging import expanded
from mmscale.errors import ConfigError


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
    parts = expanded(run)
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
