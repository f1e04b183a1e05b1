"""Groups of parameters by component, depth, and decay or none; the optimizer and its rate."""

import difflib
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import Tensor, nn

from mmscale.config.training import OptimConfig
from mmscale.contracts import KINDS, PARTS
from mmscale.errors import ConfigError
from mmscale.model.freezing import layer_scales
from mmscale.model.two_tower import component_of, no_decay


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Groups with `name`, `component`, `base_lr`, `balance`, `weight_decay`, `names` and a size.

    Every trained parameter is in exactly one; `parameters` counts its numbers. A group is one
    component's, at one depth where `layer_decay` tells depths apart.

    Raises:
        ConfigError: Nothing is trained.
    """
    groups: dict[tuple[str, float, bool], dict[str, Any]] = {}
    depths = _depths(model, config)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        component, depth = component_of(name), depths.get(name, 1.0)
        decays = not no_decay(name, parameter)
        rate = config.lr * getattr(config.lr_scale, component) * depth
        decay = config.weight_decay * getattr(config.weight_decay_scale, component)
        group = groups.setdefault(
            (component, depth, decays),
            {
                "name": _group_name(component, depth, decays),
                "component": component,
                "params": [],
                "names": [],
                "base_lr": rate,
                "balance": 1.0,
                "lr": rate,
                "weight_decay": decay if decays else 0.0,
                "parameters": 0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
        group["parameters"] += parameter.numel()
    if not groups:
        raise ConfigError("nothing is trained: every part of the model is frozen; unfreeze one")
    return list(groups.values())


def _depths(model: nn.Module, config: OptimConfig) -> dict[str, float]:
    """Factor by depth for the parameters of towers whose layers have rates of their own."""
    factors: dict[str, float] = {}
    for component in ("vision", "text"):
        decay = getattr(config.layer_decay, component)
        if decay < 1:
            tower: Any = model.get_submodule(component)
            scales = layer_scales(tower, decay)
            factors |= {f"{component}.{name}": factor for name, factor in scales.items()}
    return factors


def _group_name(component: str, depth: float, decays: bool) -> str:
    layer = "" if depth == 1 else f" x {depth:.3g}"
    return f"{component}{layer}.{'decay' if decays else 'no_decay'}"


def set_rates(groups: list[dict[str, Any]], factor: float) -> None:
    """Every group's rate at `factor` times its base, and times its `balance`."""
    for group in groups:
        group["lr"] = group["base_lr"] * factor * group["balance"]


def decides_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its update reads a divisor and a flag from the device: torch's fused ones do."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def decide_on_device(
    optimizer: Any, total_norm: float | Tensor, clip_norm: float | None, applied: Tensor
) -> None:
    """Let the coming update clip a gradient of this norm, and pass where `applied` is false."""
    norm = torch.as_tensor(total_norm)
    divisor = torch.ones_like(norm) if clip_norm is None else (norm + 1e-6) / clip_norm
    optimizer.grad_scale = divisor.clamp(min=1).float()
    optimizer.found_inf = applied.logical_not().float()


def trained_parts(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Trained parameters by `PARTS`, in their order; taken before an engine shards the model."""
    named = dict(model.named_parameters())
    return {part: [named[name] for name in names] for part, names in part_names(model).items()}


def part_names(model: nn.Module) -> dict[str, list[str]]:
    """Names of the trained parameters by `PARTS`, likewise."""
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = KINDS[0] if parameter.ndim > 1 else KINDS[1]
            parts[f"{component_of(name)}_{kind}"].append(name)
    return parts


def persistent_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers that belong to a checkpoint; the others follow from the architecture."""
    kept = model.state_dict().keys()
    return [(name, buffer) for name, buffer in model.named_buffers() if name in kept]


def rate_factor(step: int, total: int, warmup: int, kind: str) -> float:
    """Factor of the base rate for update `step` (from 0) of `total`.

    Args:
        step: Updates already made.
        total: Updates of the whole run, or of its stage.
        warmup: Updates over which the rate rises linearly; cut to `total`.
        kind: `cosine`, `linear`, `constant` or `plateau` after the warm-up; a plateau's falls are a
            factor of their own.
    """
    warmup = min(warmup, total)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if kind == "cosine":
        return (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return max(0.0, 1 - progress) if kind == "linear" else 1.0


COUNTS = "counts updates for all parameters together"
EARLY = "makes its state before parameters are cut"
WHOLE = "treats each tensor as a whole"


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer keeps from one update to the next.

    Attributes:
        moments: Tensors of a parameter's shape, for each parameter.
        counts: `tensor` or `number`, in which it counts a parameter's updates; None: it does not.
        group_counts: Likewise, for the updates of a whole group.
        unsharded: Why flat pieces of several tensors cannot stand for them; None where they can.
    """

    moments: tuple[str, ...]
    counts: str | None = None
    group_counts: str | None = None
    unsharded: str | None = None


_ADAM = ("exp_avg", "exp_avg_sq")
_ADAMS = (*_ADAM, "max_exp_avg_sq")
_ADAN = (*_ADAM, "exp_avg_diff", "neg_pre_grad")
_BELIEF = ("exp_avg", "exp_avg_var", "max_exp_avg_var")
_RMS = ("square_avg", "momentum_buffer", "grad_avg")
_MOMENTUM = ("momentum_buffer",)
# timm's names. A cautious variant (c...) divides by a mean over the tensor.
_FAMILIES = {
    "adamw adam adamc adamwlegacy": OptimizerState(_ADAMS, "tensor"),
    "cadamw cadamc": OptimizerState(_ADAMS, "tensor", unsharded=WHOLE),
    "adopt adoptc adoptw nadamw nadamc radam radamw": OptimizerState(_ADAM, "tensor"),
    "cadopt cadoptc cadoptw cnadamw cnadamc": OptimizerState(_ADAM, "tensor", unsharded=WHOLE),
    "radamlegacy": OptimizerState(_ADAM, "number"),
    "adabelief radabelief": OptimizerState(_BELIEF, "number"),
    "adamp cadamp": OptimizerState(_ADAM, "number", unsharded=WHOLE),
    "adamax": OptimizerState(("exp_avg", "exp_inf"), "tensor"),
    "adadelta": OptimizerState(("square_avg", "acc_delta"), "tensor"),
    "adagrad": OptimizerState(("sum",), "tensor", unsharded=EARLY),
    "adan adanw cadan cadanw": OptimizerState(_ADAN, group_counts="number", unsharded=COUNTS),
    "lamb lambc lambcd lambcw lambw clamb clambw": OptimizerState(
        _ADAM, group_counts="tensor", unsharded=WHOLE
    ),
    "lars larc nlars nlarc": OptimizerState(_MOMENTUM, unsharded=WHOLE),
    "lion lionc": OptimizerState(("exp_avg",)),
    "clion clionc": OptimizerState(("exp_avg",), unsharded=WHOLE),
    "madgrad madgradw": OptimizerState(("grad_sum_sq", "s", "x0"), "number"),
    "mars cmars": OptimizerState(("exp_avg", "last_grad", "exp_avg_sq"), "number", unsharded=WHOLE),
    "rmsprop rmsproptf rmsproptfc rmsproptfw": OptimizerState(_RMS, "tensor"),
    "crmsproptf": OptimizerState(_RMS, "tensor", unsharded=WHOLE),
    "sgd momentum nesterov sgdw sgdc nesterovw": OptimizerState(_MOMENTUM),
    "csgdw csgdc": OptimizerState(_MOMENTUM, unsharded=WHOLE),
    "sgdp csgdp": OptimizerState(("momentum",), unsharded=WHOLE),
}
_IN_TIMM = set(list_optimizers())
KNOWN = {
    name: kept
    for names, kept in _FAMILIES.items()
    for name in names.split()
    # An older timm has fewer.
    if name in _IN_TIMM
}
# Moments that are there only with an option, and its default.
_OPTIONAL = {
    "momentum_buffer": ("momentum", True),
    "x0": ("momentum", True),
    "max_exp_avg_sq": ("amsgrad", False),
    "max_exp_avg_var": ("amsgrad", False),
    "grad_avg": ("centered", False),
}


@dataclass(frozen=True)
class OptimizerKind:
    """An optimizer that checkpoints can hold.

    Attributes:
        config: Its settings.
        fused: AdamW runs as one kernel.
        kept: What it keeps.
        moments: Those of `kept` that are there with its options.
    """

    config: OptimConfig
    fused: bool
    kept: OptimizerState

    @property
    def moments(self) -> tuple[str, ...]:
        options = self.config.options
        switches = ((name, *_OPTIONAL.get(name, ("", True))) for name in self.kept.moments)
        return tuple(name for name, option, default in switches if options.get(option, default))

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer over groups that say their `lr` and `weight_decay`.

        Raises:
            ConfigError: It does not take `optim.options`.
        """
        config, name = self.config, self.config.name.lower()
        if name == "adamw":
            # timm's default betas aside, its adamw is this one; torch's takes `fused`.
            make: Any = partial(
                torch.optim.AdamW, betas=config.betas, eps=config.eps, fused=self.fused
            )
        else:
            two = get_optimizer_info(name).num_betas == 2
            betas: dict[str, Any] = {"betas": config.betas} if two else {}
            make = partial(create_optimizer_v2, opt=name, lr=config.lr, eps=config.eps, **betas)
        try:
            optimizer: torch.optim.Optimizer = make(groups, **config.options)
        except (TypeError, ValueError, ImportError, AssertionError) as error:
            raise ConfigError(
                f"optim.name={config.name} with optim.options={config.options} cannot be built "
                f"({error}); mend the options or take another optimizer"
            ) from error
        return optimizer

    def state(self, parameter: Tensor, moments: dict[str, Tensor], updates: int) -> dict[str, Any]:
        """A parameter's state after so many updates, with these moments."""
        if self.kept.counts is None:
            return dict(moments)
        # One kernel for all wants its counts beside the weights.
        place = parameter.device if self.fused else None
        return {"step": _counted(self.kept.counts, updates, place), **moments}

    def resume(self, optimizer: torch.optim.Optimizer, updates: int) -> None:
        """Set what is counted in the groups."""
        for group in optimizer.param_groups if self.kept.group_counts else ():
            group["step"] = _counted(str(self.kept.group_counts), updates)


def _counted(form: str, updates: int, place: torch.device | None = None) -> Tensor | int:
    return torch.tensor(float(updates), device=place) if form == "tensor" else updates


def optimizer_kind(
    config: OptimConfig, fused: bool, sharded: bool, flat: bool = True
) -> OptimizerKind:
    """Look an optimizer up, and try whether it takes its options.

    Args:
        config: `optim`.
        fused: AdamW may run as one kernel.
        sharded: An engine is going to cut its parameters over the ranks.
        flat: It joins pieces of several parameters to one, as ZeRO does and FSDP2 does not.

    Raises:
        ConfigError: The name is unknown, the options are wrong, or shards would train something
            else.
    """
    key, kept = f"optim.name={config.name}", KNOWN.get(config.name.lower())
    if kept is None:
        close = difflib.get_close_matches(config.name.lower(), KNOWN, 2)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ConfigError(
            f"{key} is not an optimizer whose state a checkpoint can hold; {hint}known are "
            f"{', '.join(sorted(KNOWN))}"
        )
    kind = OptimizerKind(config, fused, kept)
    replace(kind, fused=False).build([{"params": [torch.zeros(1, requires_grad=True)]}])
    if sharded and kept.unsharded and (flat or kept.unsharded == WHOLE):
        who = "ZeRO" if flat else "FSDP2, engine.kind=accelerate on several ranks"
        how = "into flat pieces" if flat else "over the ranks"
        repair = "run on one device" if kept.unsharded == WHOLE else "set engine.kind=accelerate"
        raise ConfigError(
            f"{key} {kept.unsharded}, so {who}, which cuts parameters {how}, would train something "
            f"else; {repair}, or set optim.name to adamw, sgd or lion"
        )
    return kind
