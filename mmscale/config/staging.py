"""From the configuration of a run with stages to that of each stage."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from mmscale.config.schema import Config
from mmscale.config.stages import StageConfig

DATA = ("augment", "crop_scale", "feature_cache", "hard_batches")
_BLOCKS = re.compile(r"(vision|text)\[(-?\d*)(?::(-?\d*))?\]")


def expanded(config: Config) -> tuple[StageConfig, ...]:
    """The stages of a run, progressive unfreezing cut into its parts; none: a run without."""
    return tuple(part for stage in config.stages for part in _parts(stage))


def _parts(stage: StageConfig) -> Iterator[StageConfig]:
    if stage.unfreeze is None:
        yield stage
        return
    count, blocks = stage.unfreeze.parts, stage.unfreeze.blocks
    duration = replace(stage.duration, amount=stage.duration.amount / count)
    for part in range(1, count + 1):
        patterns = [f"{tower}[-{part * blocks}:]" for tower in stage.unfreeze.towers]
        yield stage.model_copy(
            update={
                "name": f"{stage.name}-{part}",
                "duration": duration,
                "train": (*stage.train, *patterns),
                "unfreeze": None,
            }
        )


def stage_settings(config: Config, stage: StageConfig) -> dict[str, Any]:
    """Nested settings of one stage of a run, as if it were a run of its own.

    Cached features serve the stages in which both towers rest.
    """
    settings: dict[str, Any] = config.model_dump(mode="json")
    settings["stages"] = []
    for name in ("optim", "negatives", "data"):
        settings[name] = merged(settings[name], getattr(stage, name))
    if stage.loss:
        settings["loss"] = stage.loss
    for name in ("global_batch_size", "micro_batch_size"):
        if getattr(stage, name) is not None:
            settings["train"][name] = getattr(stage, name)
    for tower in ("vision", "text"):
        if not any(may_match(pattern, tower) for pattern in stage.train):
            settings["model"][tower]["frozen"] = True
    if not all(settings["model"][tower]["frozen"] is True for tower in ("vision", "text")):
        settings["data"]["feature_cache"] = None
    return settings


def stage_faults(config: Config) -> Iterator[str]:
    """What is wrong with the list of stages itself."""
    for number, stage in enumerate(config.stages):
        for name in stage.data.keys() - set(DATA):
            yield (
                f"stages.{number}.data.{name} cannot change within a run; a stage's data may say "
                f"{', '.join(DATA)}"
            )
        if not stage.train and stage.unfreeze is None:
            yield f"stages.{number}.train is empty; name what is trained, such as [head, scale]"


def blocks_of(pattern: str) -> tuple[str, slice] | None:
    """Tower and slice of a pattern like `vision[-2:]` or `text[0]`; None for other patterns."""
    found = _BLOCKS.fullmatch(pattern)
    if found is None or (found[2] in ("", "-") and found[3] is None) or "-" in (found[2], found[3]):
        return None
    first = int(found[2]) if found[2] else None
    if found[3] is None:
        assert first is not None, "one block has a number"
        return found[1], slice(first, None if first == -1 else first + 1)
    return found[1], slice(first, int(found[3]) if found[3] else None)


def may_match(pattern: str, tower: str) -> bool:
    """Whether a pattern could match a parameter of a tower."""
    start = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
    return start.startswith(f"{tower}.") or f"{tower}.".startswith(start)


def merged(settings: dict[str, Any], update: dict[str, Any]) -> dict[str, Any]:
    """Settings with those that differ, at any depth."""
    result = dict(settings)
    for key, value in update.items():
        inner = result.get(key)
        if isinstance(value, dict) and isinstance(inner, dict):
            value = merged(inner, value)
        result[key] = value
    return result
