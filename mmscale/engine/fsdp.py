"""The engine for several devices without DeepSpeed: torch's FSDP2, a transformer block at a time.

Every trained parameter is cut over the ranks along its first dimension: masters in fp32, moments
and gradients are shares. A block's weights are gathered in the precision of products, once an
update unless `engine.reshard_after_forward` asks for them anew, and its gradient is summed in fp32
while the backward goes on with the block before it. Frozen parameters stay whole on every rank.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm

from mmscale.config.schema import Config
from mmscale.contracts import NamedTensor, World
from mmscale.engine.ema import averaged
from mmscale.engine.loss_scale import LossScale
from mmscale.engine.optimizer import (
    decide_on_device,
    decides_on_device,
    optimizer_kind,
    parameter_groups,
    part_names,
    persistent_buffers,
    set_rates,
)
from mmscale.engine.protocol import Shadow
from mmscale.model.batch_norm import GlobalBatchNorm
from mmscale.model.blocks import model_blocks
from mmscale.model.scale import LogitScale
from mmscale.parallel.device import DevicePolicy
from mmscale.parallel.world import check_world

# Kept in fp32 in every precision: small, and a running statistic's or the scale's partner.
KEPT_WIDE = (_BatchNorm, GlobalBatchNorm, LogitScale)


class FsdpEngine:
    """The model in shares over all ranks, by FSDP2."""

    def __init__(self, model: nn.Module, config: Config, policy: DevicePolicy, world: World):
        self._mesh = init_device_mesh(policy.device.type, (world.size,))
        check_world(world, self._mesh.size(), "FSDP2")
        self.label = "FSDP2"
        self.device = policy.device
        self._dtype = policy.dtype
        self._clip = config.optim.clip_norm
        self._keeps = not config.engine.reshard_after_forward
        names = part_names(model)
        self.groups: list[dict[str, Any]] = parameter_groups(model, config.optim)
        # Nothing changes an output in place.
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view")
        self.module: Any = model.to(policy.device)
        sharded = shard(model, policy.dtype, self._mesh, self._keeps)
        self._shares = {name: _Share(parameter) for name, parameter in sharded.items()}
        self._parts = [[self._shares[name] for name in part] for part in names.values()]
        for group in self.groups:
            group["params"] = [self._shares[name].master for name in group["names"]]
        fused = policy.fused_optimizer
        self._kind = optimizer_kind(config.optim, fused, sharded=True, flat=False)
        self._optimizer: Any = self._kind.build(self.groups)
        self.groups = self._optimizer.param_groups
        self._scale = LossScale() if policy.dtype == torch.float16 else None
        can_skip = self._scale is None and decides_on_device(self._optimizer)
        self.decides_on_device = policy.runs_ahead and can_skip

    def call(self, mode: str, *inputs: Any) -> Any:
        # Weights come in the precision of products; autocast brings what they meet to it.
        narrow = self._dtype != torch.float32
        with torch.autocast(self.device.type, self._dtype, enabled=narrow):
            return self.module(mode, *inputs)

    def begin_update(self) -> None:
        for share in self._shares.values():
            share.forget()

    def backward(self, loss: Tensor, last: bool, scaled: bool = False) -> None:
        self.module.set_requires_gradient_sync(last)
        self.module.set_is_last_backward(last)
        self.module.set_reshard_after_backward(last or not self._keeps)
        # The heads' backward passes it before that of the towers.
        self.module.set_reshard_after_backward(False, recurse=False)
        if self._scale is not None and not scaled:
            loss = loss * self._scale.value
        loss.backward()
        if last:
            self.module.reshard()
            for share in self._shares.values():
                share.take_gradient()

    def part_norms(self) -> Float[Tensor, " parts"]:
        if self._scale is not None:
            torch._foreach_div_(self._gradients(), self._scale.value)
        squares = [
            torch.stack(torch._foreach_norm([share.gradient for share in part])).square().sum()
            if part
            else torch.zeros((), device=self.device)
            for part in self._parts
        ]
        return torch.stack(squares)

    def apply(
        self, factor: float, total_norm: float | Tensor, applied: Tensor | None = None
    ) -> None:
        set_rates(self.groups, factor)
        if applied is not None:
            decide_on_device(self._optimizer, total_norm, self._clip, applied)
        elif self._clip is not None and total_norm > self._clip:
            torch._foreach_mul_(self._gradients(), self._clip / (total_norm + 1e-6))
        self._optimizer.step()
        # What a forward without a graph left whole would be out of date.
        _reshard(self.module)
        if self._scale is not None:
            self._scale.update(applied=True)

    def skip_update(self) -> None:
        if self._scale is not None:
            self._scale.update(applied=False)

    def masters(self) -> Iterator[tuple[str, Tensor]]:
        for name, share in self._shares.items():
            if share.master.numel():
                yield name, share.master.detach()

    def cut(self, name: str, whole: Tensor) -> Tensor:
        return self._shares[name].cut(whole)

    def pull(self, added: Iterable[tuple[str, Tensor]], factor: float) -> None:
        if self._scale is not None:
            factor *= self._scale.value
        for name, value in added:
            self._shares[name].gradient.add_(value, alpha=factor)

    def tensors(self) -> Iterator[NamedTensor]:
        state = self._optimizer.state
        for name, parameter in self.module.named_parameters():
            share = self._shares.get(name)
            if share is None:
                yield NamedTensor(name, parameter.detach(), {})
                continue
            kept = state[share.master]
            moments = {key: share.whole(kept[key]) for key in self._kind.moments if key in kept}
            yield NamedTensor(name, share.whole(share.master.detach()), moments, True)
        for name, buffer in persistent_buffers(self.module):
            yield NamedTensor(name, buffer, {})

    def shadow(self, module: nn.Module) -> Shadow:
        return _ShardedMean(module.to(self.device), self)

    def scaler(self) -> dict[str, float]:
        return {} if self._scale is None else self._scale.state()

    def restore(
        self,
        moments: Callable[[str], dict[str, Tensor]],
        updates: int,
        scaler: dict[str, float],
    ) -> None:
        if scaler and self._scale is not None:
            self._scale.restore(scaler)
        for name, share in self._shares.items():
            if found := moments(name):
                own = {key: share.cut(value).to(self.device) for key, value in found.items()}
                state = self._kind.state(share.master, own, updates)
                self._optimizer.state[share.master] = state
        self._kind.resume(self._optimizer, updates)

    def close(self) -> None:
        self._optimizer.state.clear()
        self._shares.clear()

    def _gradients(self) -> list[Tensor]:
        return [share.gradient for share in self._shares.values()]


class _Share:
    """A rank's piece of a parameter, as a parameter of its own.

    Attributes:
        master: What the optimizer moves: the same memory as FSDP's shard.
    """

    def __init__(self, sharded: Any):
        self._sharded = sharded
        self.master = nn.Parameter(sharded.detach().to_local())

    @property
    def gradient(self) -> Tensor:
        """Averaged over ranks; after `take_gradient`."""
        assert self.master.grad is not None, "the update's last backward comes first"
        return self.master.grad

    def forget(self) -> None:
        """Drop the gradient."""
        self._sharded.grad = self.master.grad = None

    def take_gradient(self) -> None:
        """Let the optimizer see FSDP's gradient; what took no part in an update has zero."""
        found = self._sharded.grad
        self.master.grad = torch.zeros_like(self.master) if found is None else found.to_local()

    def whole(self, piece: Tensor) -> Tensor:
        """All ranks' pieces of something that is cut as the parameter is. Collective."""
        sharded = self._sharded
        return DTensor.from_local(
            piece,
            sharded.device_mesh,
            sharded.placements,
            run_check=False,
            shape=sharded.shape,
            stride=sharded.stride(),
        ).full_tensor()

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's piece of a tensor of the parameter's shape."""
        mesh = self._sharded.device_mesh
        pieces, rank = whole.chunk(mesh.size()), mesh.get_local_rank()
        return pieces[rank].clone() if rank < len(pieces) else whole[:0].clone()


class _ShardedMean:
    """The running mean of a sharded model, in the same shares: no communication to follow."""

    def __init__(self, module: nn.Module, engine: FsdpEngine):
        trained, names = engine.module, list(engine._shares)
        for name in names:
            # What is cut; frozen parameters are shared with the trained model.
            module.get_parameter(name).requires_grad_(True)
        self._own = {
            name: _Share(parameter)
            for name, parameter in shard(module, engine._dtype, engine._mesh, False).items()
        }
        self.module = module.requires_grad_(False)
        self._pairs: list[tuple[Tensor, Tensor]] = [
            (self._own[name].master, engine._shares[name].master) for name in names
        ]
        own, other = averaged(module, trained), averaged(trained, trained)
        self._statistics = {name: own[name] for name in other if name not in self._own}
        self._pairs += [(own[name], other[name]) for name in self._statistics]

    @torch.no_grad()
    def follow(self, share: float | Tensor) -> None:
        for mean, latest in self._pairs:
            mean.lerp_(latest, share.to(mean.dtype) if isinstance(share, Tensor) else share)
        # The weights of the last forward are out of date.
        _reshard(self.module)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, own in self._own.items():
            yield name, own.whole(own.master.detach())
        yield from self._statistics.items()

    def close(self) -> None:
        self._pairs, self._own = [], {}


def shard(model: nn.Module, dtype: torch.dtype, mesh: DeviceMesh, keeps: bool) -> dict[str, Any]:
    """Cut the trained parameters of a model over the ranks, in place.

    Args:
        model: Whole, on its device.
        dtype: Of products.
        mesh: All ranks.
        keeps: A block's weights stay whole from its forward to its backward.

    Returns:
        Each of them by name, cut.
    """
    frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    wide = MixedPrecisionPolicy(cast_forward_inputs=False)
    is_narrow = dtype != torch.float32
    # A block's residual stream has the precision of products, whatever precedes it.
    inside = MixedPrecisionPolicy(dtype, torch.float32) if is_narrow else wide
    outside = replace(inside, cast_forward_inputs=False)

    def cut(module: nn.Module, policy: MixedPrecisionPolicy, keeps: bool = keeps) -> None:
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=not keeps,
            mp_policy=policy,
            ignored_params=frozen,
        )

    # A block is called as a module, and by nothing else.
    units = [(block, inside) for block in model_blocks(model)]
    units += [(head, outside) for head in model.get_submodule("head").children()]
    if is_narrow:
        kept = [(part, wide) for part in model.modules() if isinstance(part, KEPT_WIDE)]
        units = [*kept, *units]
    for module, policy in units:
        if any(parameter.requires_grad for parameter in module.parameters()):
            cut(module, policy)
    # Embeddings and the last norms: whole from the first forward to the end of the last backward.
    cut(model, outside, keeps=True)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _reshard(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
