"""How deep a tower's parameters lie: what layer-wise rates are made of."""

from timm.optim import param_groups_layer_decay
from torch import nn

from mmscale.model.width import Tower


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
