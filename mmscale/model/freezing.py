"""What of a built model is trained and how: `frozen`, `checkpointing`, and what a stage selects."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from timm.optim import param_groups_layer_decay
from torch import nn

from mmscale.config.model import TowerConfig
from mmscale.config.rules import blocks_of, expanded_stages
from mmscale.config.schema import Config
from mmscale.contracts import COMPONENTS
from mmscale.errors import ConfigError
from mmscale.model.adapters import attach_adapter
from mmscale.model.tower import Tower
from mmscale.model.two_tower import TwoTower, component_of


def apply_settings(tower: Tower, config: TowerConfig, key: str) -> None:
    """Apply a tower's settings that are the same for every library.

    Args:
        tower: Built and looked at.
        config: `model.vision` or `model.text`.
        key: Which of them.

    Raises:
        ConfigError: The width is another, or the library cannot do what is asked, or settings
            contradict each other.
    """
    if config.width not in (None, tower.width):
        raise ConfigError(
            f"{key}.width={config.width}, but {config.name} gives {tower.width} features; remove "
            f"the setting or write {key}.width={tower.width}."
        )
    if config.frozen is True and getattr(config, "pooling", "auto") == "map":
        raise ConfigError(
            f"{key}.pooling=map is learnt, and {key}.frozen=true keeps it as it was drawn; freeze "
            f"the blocks alone with {key}.frozen={len(tower.block_parameters()) - 1}, or pool by "
            f"mean."
        )
    for name in tower.inert:
        tower.get_parameter(name).requires_grad_(False)
    if config.frozen is not False and config.frozen is not True:
        freeze_blocks(tower, config.frozen, f"{key}.frozen={config.frozen}", str(config.name))
    if config.adapter.kind != "none":
        attach_adapter(tower, config, key)
    if config.frozen is not False and config.frozen is not True:
        tower.rest([module for module in tower.modules() if _frozen(module)])
    if config.checkpointing and not tower.checkpoint_blocks():
        raise ConfigError(
            f"{key}.checkpointing=true, but the library of {config.name} has no checkpointing for "
            f"it; remove the setting, or lower train.micro_batch_size to save memory."
        )


def freeze_blocks(tower: Tower, count: int, setting: str, name: str) -> None:
    """Freeze what comes before the blocks and the first `count` of them, or all but the last.

    Args:
        tower: Any.
        count: Blocks from the input; negative: all but so many at the end.
        setting: For the message.
        name: Likewise.

    Raises:
        ConfigError: There are not so many blocks.
    """
    groups = tower.block_parameters()
    blocks = len(groups) - 1
    if not 1 <= abs(count) <= blocks:
        raise ConfigError(
            f"{setting}: {name} has {blocks} blocks; give 1 to {blocks} to freeze from the input, "
            f"-1 to -{blocks} to train so many at the end, true or false."
        )
    for group in groups[: 1 + count] if count > 0 else groups[:count]:
        for parameter in group:
            tower.trunk.get_parameter(parameter).requires_grad_(False)


def chain(trunk: nn.Module, late: tuple[str, ...] = ()) -> list[list[str]]:
    """Parameters before the blocks and block by block, read from a module's lists and sequences.

    Lists side by side whose indices mean the same layer (FlauBERT's) are one chain; sequences
    follow one another (a ResNet's stages). What has no index joins what comes before it.

    Args:
        trunk: Its parameters are registered in the order of the forward,
        late: but for those of these prefixes, which come last.
    """
    groups: dict[tuple[object, ...], list[str]] = {(): []}
    key: tuple[object, ...] = ()
    ending = []
    for name, _ in trunk.named_parameters():
        if name.startswith(late):
            ending.append(name)
            continue
        key = _block_key(trunk, name) or key
        groups.setdefault(key, []).append(name)
    chained = list(groups.values())
    chained[-1].extend(ending)
    return chained


def _block_key(trunk: nn.Module, name: str) -> tuple[object, ...] | None:
    module, path = trunk, name.split(".")[:-1]
    for depth, part in enumerate(path):
        if part.isdigit() and isinstance(module, nn.ModuleList):
            return ("list", *path[: depth - 1], int(part))
        if part.isdigit() and isinstance(module, nn.Sequential):
            return ("sequence", *path[:depth], int(part))
        module = module.get_submodule(part)
    return None


def _frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def layer_scales(tower: Tower, decay: float) -> dict[str, float]:
    """Factor of the rate for every trained parameter of a tower, by its name in the tower.

    The last layer has factor 1 and each one below another factor `decay`. A timm model's layers
    are timm's; others' are what comes before the blocks and block by block, the last one with what
    follows it. A learnt pooling of ours is above all layers.

    Source: Bao et al. 2021, "BEiT" (arXiv 2106.08254), as timm has it.
    """
    by_timm = hasattr(tower.trunk, "group_matcher")
    factors = _by_timm(tower.trunk, decay) if by_timm else _by_blocks(tower, decay)
    return {
        name: factors.get(name.removeprefix("trunk."), 1.0)
        for name, parameter in tower.named_parameters()
        if parameter.requires_grad
    }


def _by_timm(trunk: nn.Module, decay: float) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in trunk.named_parameters()}
    return {
        names[id(parameter)]: float(group["lr_scale"])
        for group in param_groups_layer_decay(trunk, layer_decay=decay)
        for parameter in group["params"]
    }


def _by_blocks(tower: Tower, decay: float) -> dict[str, float]:
    layers = tower.block_parameters()
    last = len(layers) - 1
    return {name: decay ** (last - index) for index, layer in enumerate(layers) for name in layer}


TOWERS = ("vision", "text")


def check_patterns(model: TwoTower, config: Config) -> None:
    """Refuse a run in which a pattern of some stage matches nothing.

    Raises:
        ConfigError: Names each such pattern.
    """
    if not config.stages:
        return
    names = _trainable(model, config)
    faults = [
        f"stages: {pattern!r} of stage {stage.name!r} matches no parameter that may be trained; "
        f"give components ({', '.join(_components(names))}), blocks such as vision[-2:], or names "
        f"such as {_example(names)}, and unfreeze model.vision or model.text if it is frozen"
        for stage in expanded_stages(config)
        for pattern in stage.train
        if not matched(model, names, pattern)
    ]
    if faults:
        raise ConfigError("\n".join(faults))


def select(model: TwoTower, config: Config, number: int) -> list[str]:
    """Leave only what a stage trains trainable; a line about each of its patterns.

    A tower of which nothing is trained becomes a frozen one; modules without trained parameters
    rest in evaluation mode.
    """
    stages = expanded_stages(config)
    if not stages:
        return []
    stage, names = stages[number], _trainable(model, config)
    chosen: set[str] = set()
    lines = [f"stage {number + 1} of {len(stages)}, {stage.name!r}, trains"]
    for pattern in stage.train:
        found = matched(model, names, pattern)
        size = sum(model.get_parameter(name).numel() for name in found)
        lines.append(f"  {pattern}: {len(found):,} tensors, {size:,} parameters")
        chosen |= set(found)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in chosen)
    idle = {name for name in TOWERS if not any(n.startswith(f"{name}.") for n in chosen)}
    model.freeze(idle)
    for name in set(TOWERS) - idle:
        tower = _tower(model, name)
        tower.rest([module for module in tower.modules() if _frozen(module)])
    return lines


def matched(model: TwoTower, names: Sequence[str], pattern: str) -> list[str]:
    """Which of these parameters a pattern means."""
    if blocks := blocks_of(pattern):
        tower, part = blocks
        # What comes before the blocks is none.
        groups = _tower(model, tower).block_parameters()[1:][part]
        wanted = {f"{tower}.trunk.{name}" for group in groups for name in group}
        return [name for name in names if name in wanted]
    if pattern in COMPONENTS:
        return [name for name in names if component_of(name) == pattern]
    return [name for name in names if fnmatchcase(name, pattern)]


def _trainable(model: TwoTower, config: Config) -> list[str]:
    """Parameters that some stage may train, whatever the present one does."""
    shut = {name for name in TOWERS if getattr(config.model, name).frozen is True}
    inert = {f"{name}.{inner}" for name in TOWERS for inner in _tower(model, name).inert}
    return [
        name
        for name, _ in model.named_parameters()
        if component_of(name) not in shut and name not in inert
    ]


def _tower(model: TwoTower, name: str) -> Any:
    return model.get_submodule(name)


def _components(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(component_of(name) for name in names))


def _example(names: Sequence[str]) -> str:
    return f"{names[0].rsplit('.', 1)[0]}.*" if names else "head.*"
