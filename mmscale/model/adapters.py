"""Adapters: a tower keeps its own weights and learns small matrices beside them, through peft.

LoRA gives a kept weight W, [out in], the sum W + (alpha / rank) B A with A [rank in] drawn at
random and B [out rank] zero at first, so that the tower begins as it was.

Source: Hu et al. 2021, "LoRA" (arXiv 2106.09685); the scale alpha / sqrt(rank) of `rslora`:
Kalajdzievski 2023 (arXiv 2312.03732).
"""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from mmscale.config.model import AdapterConfig, TowerConfig
from mmscale.errors import ConfigError
from mmscale.model.tower import Tower, look

NAME = "default"  # what peft calls the only adapter of a model


def attach_adapter(tower: Tower, config: TowerConfig, key: str) -> None:
    """Put the adapter that `config` asks for into a tower, and keep what is below it.

    Parameters of the trunk are kept; with a number in `frozen`, those that it keeps, and only they
    get an adapter. A pooling of ours above the trunk is trained as before.

    Args:
        tower: With its weights, and what `frozen` keeps no longer trained.
        config: `model.vision` or `model.text`.
        key: Which of them.

    Raises:
        ConfigError: peft is not installed, or a target is no layer that an adapter can serve.
    """
    _require_peft(f"{key}.adapter.kind={config.adapter.kind}")
    partly = config.frozen is not True and config.frozen is not False
    whole = [p for p in tower.trunk.parameters() if partly and p.requires_grad]
    names = _targets(tower, {id(p) for p in whole}, config, key)
    _inject(tower.trunk, names, config.adapter)
    for parameter in whole:
        parameter.requires_grad_(True)
    _require_reached(tower, config, key)
    trained = tower.named_parameters()
    tower.inert = frozenset(name for name, p in trained if not p.requires_grad)


def adapted(tower: nn.Module) -> bool:
    """Whether a tower has an adapter."""
    return any(True for _ in _layers(tower))


def is_adapters(name: str) -> bool:
    """Whether a tensor of this name is an adapter's own."""
    return ".lora_" in name


def below_adapter(name: str) -> str:
    """The name that a kept tensor has in the tower without an adapter."""
    return name.replace(".base_layer.", ".")


def merge_adapter(tower: nn.Module) -> None:
    """Add an adapter to the weights that it stands beside, which then are the whole tower."""
    _unload(tower, merge=True)


def drop_adapter(tower: nn.Module) -> None:
    """Take an adapter away: what is left is the tower as it was before training."""
    _unload(tower, merge=False)


def _require_peft(setting: str) -> None:
    if find_spec("peft") is None:
        raise ConfigError(
            f"{setting} needs peft, which is not installed; run pip install 'mmscale[adapters]' or "
            f"set it to none."
        )


def _inject(trunk: nn.Module, names: list[str], config: AdapterConfig) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    from mmscale.model.adapter_attention import AdaptedAttention

    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        use_rslora=config.kind == "rslora",
        target_modules=names,
    )
    # peft's own layer takes the weights out of the module and puts rounded ones back.
    lora._register_custom_module({nn.MultiheadAttention: AdaptedAttention})
    inject_adapter_in_model(lora, trunk, NAME)


def _targets(tower: Tower, whole: set[int], config: TowerConfig, key: str) -> list[str]:
    """Names in the trunk of the layers that get an adapter.

    Args:
        tower: The tower.
        whole: Parameters that are trained themselves, by identity.
        config: Its settings.
        key: Where they stand.
    """
    asked = config.adapter.targets
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.MultiheadAttention)
    if asked != "auto":
        kinds = (*kinds, nn.Conv2d)
    found = [
        name
        for name, module in _outermost(tower.trunk, kinds)
        if not any(id(parameter) in whole for parameter in module.parameters())
    ]
    if asked == "auto":
        if not found:
            raise ConfigError(
                f"{key}.adapter.targets=auto finds no linear layer that {config.name} keeps; name "
                f"its layers, such as those of a convolution, or remove the adapter."
            )
        return found
    for target in asked:
        if not any(_is_meant(name, target) for name in found):
            raise ConfigError(
                f"{key}.adapter.targets holds {target!r}, which is the name of no kept linear, "
                f"convolution or attention layer of {config.name}; its layers end in "
                f"{', '.join(_endings(found))}."
            )
    return [name for name in found if any(_is_meant(name, target) for target in asked)]


def _outermost(trunk: nn.Module, kinds: tuple[type, ...]) -> Iterator[tuple[str, nn.Module]]:
    """Layers of these kinds that peft can merge; what lies within an attention belongs to it."""
    within: tuple[str, ...] = ()
    for name, module in trunk.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            within = (*within, f"{name}.")
            if not module._qkv_same_embed_dim or module.bias_k is not None or module.add_zero_attn:
                continue
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            continue
        layer: nn.Module = module
        if isinstance(module, kinds) and not name.startswith(within):
            yield name, layer


def _is_meant(name: str, target: str) -> bool:
    """As peft reads a target: a whole name, or the end of one."""
    return name == target or name.endswith(f".{target}")


def _endings(names: list[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _require_reached(tower: Tower, config: TowerConfig, key: str) -> None:
    """Take adapters out again whose layer a forward passes by, reading its weight elsewhere."""
    look(tower, *tower.row)
    idle = {name for name in tower.inert if is_adapters(name)}
    layers = {name for name, _ in _layers(tower) if any(n.startswith(f"{name}.") for n in idle)}
    if layers and config.adapter.targets != "auto":
        raise ConfigError(
            f"{key}.adapter.targets: the features of {config.name} do not pass through "
            f"{', '.join(sorted(n.removeprefix('trunk.') for n in layers)[:3])}; leave them out, "
            f"or set {key}.adapter.targets=auto."
        )
    _unload(tower, merge=False, only=layers)
    if not adapted(tower):
        raise ConfigError(
            f"{key}.adapter.targets=auto: no linear layer of {config.name} can take an adapter; "
            f"remove it."
        )


def _layers(tower: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if find_spec("peft") is None:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in tower.named_modules():
        layer: nn.Module = module
        if isinstance(module, BaseTunerLayer):
            yield name, layer


@torch.no_grad()
def _unload(tower: nn.Module, merge: bool, only: set[str] | None = None) -> None:
    within: tuple[str, ...] = ()
    for name, module in list(_layers(tower)):
        if name.startswith(within) or (only is not None and name not in only):
            continue
        within = (*within, f"{name}.")
        parent, _, child = name.rpartition(".")
        setattr(tower.get_submodule(parent), child, _without(module, merge))
    if only is None:
        vars(tower.get_submodule("trunk")).pop("peft_config", None)


def _without(module: Any, merge: bool) -> nn.Module:
    if hasattr(module, "unload_and_optionally_merge_module"):
        layer: nn.Module = module.unload_and_optionally_merge_module(merge, False, None)
        return layer
    if merge:
        module.merge()
    base: nn.Module = module.get_base_layer()
    return base
