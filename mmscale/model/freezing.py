"""What of a built tower is trained and how: `frozen`, `checkpointing`, and its checked `width`."""

from timm.optim import param_groups_layer_decay
from torch import nn

from mmscale.config.model import TowerConfig
from mmscale.errors import ConfigError
from mmscale.model.width import Tower


def settle(tower: Tower, config: TowerConfig, key: str) -> None:
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
    tower.rest([module for module in tower.modules() if _frozen(module)])


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
