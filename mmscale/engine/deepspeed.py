"""The engine that shards: `deepspeed.initialize` with ZeRO 1, 2 or 3; the one file that imports it.

Private names of DeepSpeed 0.19 are used where its API has a gap; each is held by a test in
`tests/ranks/`, and the range is narrow.
"""

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmscale.config.schema import Config
from mmscale.contracts import NamedTensor, World
from mmscale.engine.ema import Replica, averaged
from mmscale.engine.loss_scale import LossScale
from mmscale.engine.optimizer import (
    optimizer_kind,
    parameter_groups,
    persistent_buffers,
    set_rates,
    trained_parts,
)
from mmscale.engine.plan import BatchPlan
from mmscale.engine.protocol import Shadow
from mmscale.engine.zero_settings import deepspeed_settings
from mmscale.errors import ConfigError, LaunchError
from mmscale.model.blocks import blocks
from mmscale.parallel.device import DevicePolicy
from mmscale.parallel.world import check_world


class DeepSpeedEngine:
    """The model sharded over all ranks by ZeRO."""

    decides_on_device = False

    def __init__(
        self, model: nn.Module, config: Config, plan: BatchPlan, policy: DevicePolicy, world: World
    ):
        deepspeed = _import(policy)
        settings = deepspeed_settings(config, plan, policy.dtype)
        backend = "nccl" if policy.device.type == "cuda" else "gloo"
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False)
        check_world(world, deepspeed.comm.get_world_size(), "DeepSpeed")
        self._deepspeed = deepspeed
        self._stage: int = settings["zero_optimization"]["stage"]
        self.label = f"DeepSpeed ZeRO-{self._stage}"
        self.device = policy.device
        # DeepSpeed broadcasts parameters but not buffers; every rank built the same ones.
        self.module = model.to(policy.device)
        self._parts = trained_parts(model)
        groups = parameter_groups(model, config.optim)
        self._kind = optimizer_kind(config.optim, policy.fused_optimizer, sharded=True)
        optimizer = self._kind.build(groups)
        if self._stage == 3:
            _gather_by_block(deepspeed, model)
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self._zero = self._engine.optimizer
        # DeepSpeed's own for torch_autocast clips and measures gradients before they are unscaled,
        # and never lowers the scale after an overflow (0.19.8).
        self._zero.torch_autocast_gradscaler = None
        if self._stage != 3:
            # DeepSpeed's own waits for the device once a group to ask what it has asked before.
            self._zero.unscale_and_clip_grads = partial(_clip, config.optim.clip_norm)
        self._scale = LossScale() if policy.dtype == torch.float16 else None
        self.groups: list[dict[str, Any]] = self._zero.param_groups
        self._named: dict[str, Any] = dict(self._engine.module.named_parameters())
        self._updates = 0

    def call(self, mode: str, *inputs: Any) -> Any:
        return self._engine(mode, *inputs)

    def begin_update(self) -> None:
        # ZeRO-3 adds to what the update before left of a parameter that gets no gradient in the
        # first backward (deepspeed 0.19.8, partition_grads).
        buffer = getattr(self._zero, "grad_partitions_flat_buffer", None)
        if buffer is not None:
            buffer.zero_()

    def backward(self, loss: Tensor, last: bool, scaled: bool = False) -> None:
        # ZeRO-3 with offload hands a gradient to the host only in a boundary backward (0.19.8).
        self._engine.set_gradient_accumulation_boundary(last or self._stage == 3)
        lossless = last or self._stage != 1 or not self._zero.overlap_comm
        assert lossless, "ds_file was told of one chunk, and this is one of several"
        if self._scale is not None and not scaled:
            loss = loss * self._scale.value
        self._engine.backward(loss, scale_wrt_gas=False)

    def part_norms(self) -> Float[Tensor, " parts"]:
        squares = torch.zeros(len(self._parts))
        for index, part in enumerate(self._parts.values()):
            if self._scale is not None:
                for parameter in part:
                    self._unscale(parameter, self._scale.value)
            gradients = [gradient for p in part for gradient in self._gradient(p)]
            pieces = [gradient.float().pow(2).sum() for gradient in gradients]
            if pieces:
                squares[index] = torch.stack(pieces).sum().cpu()
        return squares

    def apply(
        self, factor: float, total_norm: float | Tensor, applied: Tensor | None = None
    ) -> None:
        assert applied is None, "DeepSpeed's own update asks the host"
        set_rates(self._zero.param_groups, factor)
        self._engine.step()
        self._updates += 1
        if self._scale is not None:
            self._scale.update(applied=True)

    def skip_update(self) -> None:
        # DeepSpeed skips a step by itself, on all ranks, where a gradient is not finite.
        for part in self._parts.values():
            for parameter in part:
                self._unscale(parameter, math.nan)
        self._engine.step()
        assert not self._engine.was_step_applied(), "DeepSpeed updated with a non-finite gradient"
        if self._scale is not None:
            self._scale.update(applied=False)

    def masters(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._engine.module.named_parameters():
            piece = self._master(parameter) if parameter.requires_grad else None
            if piece is not None:
                yield name, piece.detach()

    def cut(self, name: str, whole: Tensor) -> Tensor:
        parameter, flat = self._named[name], whole.flatten()
        if self._stage != 3:
            place = parameter._hp_mapping.lp_fragment_address
            return flat.narrow(0, place.start, place.numel)
        size = parameter.ds_tensor.numel()
        rank = self._deepspeed.comm.get_rank()
        return flat[rank * size : (rank + 1) * size]

    def pull(self, added: Iterable[tuple[str, Tensor]], factor: float) -> None:
        if self._scale is not None:
            factor *= self._scale.value
        for name, value in added:
            parameter = self._named[name]
            for piece in self._gradient(parameter):
                # What lies behind a parameter's end is padding.
                piece.view(-1)[: value.numel()].add_(value.to(piece.device), alpha=factor)
                self._tell_offloaded(parameter, piece)

    def tensors(self) -> Iterator[NamedTensor]:
        utils = self._deepspeed.utils
        if self._updates:
            self._link_moments()
        for name, parameter in self._engine.module.named_parameters():
            if not parameter.requires_grad:
                yield NamedTensor(name, self._whole(parameter), {})
                continue
            moments = {
                key: utils.safe_get_full_optimizer_state(parameter, key)
                for key in (self._kind.moments if self._updates else ())
            }
            yield NamedTensor(name, utils.safe_get_full_fp32_param(parameter), moments, True)
        for name, buffer in persistent_buffers(self.module):
            yield NamedTensor(name, buffer, {})

    def shadow(self, module: nn.Module) -> Shadow:
        if self._stage != 3:
            return Replica(module, self.module, self.device)
        return _ShardedShadow(self._deepspeed, module.to(self.device), self.module)

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
        self._updates = updates
        if updates == 0:
            return
        inner, zero = self._zero.optimizer, self._zero
        flats = (
            zero.fp32_partitioned_groups_flat
            if self._stage == 3
            else zero.single_partition_of_fp32_groups
        )
        for flat in flats:
            empty = {key: torch.zeros_like(flat) for key in self._kind.moments}
            inner.state[flat] = self._kind.state(flat, empty, updates)
        self._link_moments()
        for name, parameter in self._engine.module.named_parameters():
            for key, value in moments(name).items() if parameter.requires_grad else ():
                self._set_moment(parameter, value.to(self.device), key)

    def close(self) -> None:
        _destroy(self._engine)

    def _link_moments(self) -> None:
        """Let ZeRO 1 and 2 find each parameter's moments.

        They link them after the first group's first update, when the other groups have none yet
        (deepspeed 0.19.8), and never again.
        """
        if self._stage != 3:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _gradient(self, parameter: Any) -> list[Tensor]:
        """This rank's piece of a parameter's averaged gradient, itself; empty without one."""
        if self._stage == 3:
            # get_local_fp32_grad_for_param gives a copy where the piece lies in the host's memory.
            piece, _ = self._zero._get_fp32_grad_state_partition(
                parameter, release_swap_buffers=True
            )
            return [piece]
        mapping = parameter._hp_mapping
        if mapping is None:
            return []
        return [mapping.get_lp_grad_fragment(parameter._index_in_param_group)]

    def _unscale(self, parameter: Any, scale: float) -> None:
        """Divide this rank's piece of a parameter's gradient."""
        for piece in self._gradient(parameter):
            piece.div_(scale)
            self._tell_offloaded(parameter, piece)

    def _tell_offloaded(self, parameter: Any, piece: Tensor) -> None:
        """Hand a changed gradient in the host's memory back."""
        if self._stage == 3 and self._zero.offload_optimizer:
            # DeepSpeed keeps the norm that it took on the way to the host.
            parameter._z3_optimizer.set_local_grad_for_param(piece, parameter)

    def _master(self, parameter: Any) -> Tensor | None:
        """This rank's piece of a parameter in fp32; None where it holds none."""
        if self._stage != 3:
            mapping = parameter._hp_mapping
            return None if mapping is None else mapping.get_hp_fragment()
        piece = self._deepspeed.utils.safe_get_local_fp32_param(parameter)
        # What lies behind a parameter's end is padding.
        begin = self._deepspeed.comm.get_rank() * piece.numel()
        return piece.flatten()[: max(0, min(piece.numel(), parameter.ds_numel - begin))]

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        if self._stage != 3:
            return parameter.detach()
        with self._deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def _set_moment(self, parameter: Any, value: Tensor, key: str) -> None:
        if self._stage != 3:
            self._deepspeed.utils.safe_set_full_optimizer_state(parameter, value, key)
            return
        # safe_set_full_optimizer_state fails on the rank behind a parameter's end (a scalar's
        # second
        # rank), so this rank's padded slice is set.
        size = parameter.ds_tensor.numel()
        rank, world = self._deepspeed.comm.get_rank(), self._deepspeed.comm.get_world_size()
        padded = torch.zeros(size * world, dtype=value.dtype, device=value.device)
        padded[: value.numel()] = value.flatten()
        own = padded.narrow(0, rank * size, size)
        self._deepspeed.utils.safe_set_local_optimizer_state(parameter, own, key)


class _ShardedShadow:
    """A second ZeRO-3 model, without an optimizer, whose shards follow those of the first."""

    def __init__(self, deepspeed: Any, module: nn.Module, trained: nn.Module):
        self._deepspeed = deepspeed
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            # A parameter that stays whole between forwards would go stale (deepspeed 0.19.8).
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        }
        self._engine, *_ = deepspeed.initialize(
            model=module, config=settings, dist_init_required=False
        )
        self.module = self._engine
        ours, theirs = dict(module.named_parameters()), dict(trained.named_parameters())
        self._parameters: dict[str, tuple[Any, Any]] = {
            name: (ours[name], p) for name, p in theirs.items() if p.requires_grad
        }
        own, other = averaged(module, trained), averaged(trained, trained)
        self._statistics = {n: (own[n], other[n]) for n in other if n not in self._parameters}

    @torch.no_grad()
    def follow(self, share: float | Tensor) -> None:
        for own, trained in self._parameters.values():
            own.ds_tensor.data.lerp_(trained.ds_tensor.data.to(own.ds_tensor), share)
        for mean, latest in self._statistics.values():
            mean.lerp_(latest, share)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, (own, _) in self._parameters.items():
            with self._deepspeed.zero.GatheredParameters([own]):
                yield name, own.detach().clone()
        for name, (mean, _) in self._statistics.items():
            yield name, mean

    def close(self) -> None:
        _destroy(self._engine)


def _destroy(engine: Any) -> None:
    root = engine.module
    engine.destroy()
    # ZeRO-3 keeps every root module alive in a module-level list (deepspeed 0.19.8).
    from deepspeed.runtime.zero import parameter_offload

    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [module for module in stack if module is not root]


def _gather_by_block(deepspeed: Any, model: nn.Module) -> None:
    """Let ZeRO-3 gather and reduce a transformer block at a time, not a layer.

    A block's gradients are taken when that of its input is there, so it must have one: what lies
    before a tower's first block is trained, or nothing of the tower is.
    """
    for tower in (model.get_submodule(name) for name in ("vision", "text")):
        if len({parameter.requires_grad for parameter in tower.parameters()}) == 1:
            for block in blocks(tower):
                deepspeed.utils.set_z3_leaf_module(block, True)
                block.register_forward_pre_hook(_require_input)


def _require_input(block: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Refuse a block that DeepSpeed would take the gradients of before they are there."""
    if not torch.is_grad_enabled() or not any(p.requires_grad for p in block.parameters()):
        return
    if not any(isinstance(value, Tensor) and value.requires_grad for value in inputs):
        raise ConfigError(
            f"engine.deepspeed with ZeRO-3: {type(block).__name__} is not called with its tokens "
            "as first argument, so that its gradients would be lost; take zero2, or "
            "engine.kind=accelerate"
        )


def _clip(limit: float | None, gradients: list[Tensor], norm: Tensor) -> None:
    """DeepSpeed's `unscale_and_clip_grads` of ZeRO 1 and 2, of a norm known to be finite."""
    if limit is None:
        return
    factor = 1.0 / ((norm + 1e-6) / limit).clamp(min=1.0)
    for gradient in gradients:
        gradient.data.mul_(factor)


def _import(policy: DevicePolicy) -> Any:
    if policy.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise LaunchError(
            f"engine.kind=deepspeed: deepspeed cannot be imported ({error}); install the extra "
            "(`pip install 'mmscale[deepspeed]'`, Linux only) or set engine.kind=accelerate"
        ) from error
    # Compiling this op takes a minute and a compiler; only DeepSpeed's inference uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.WARNING)
    return deepspeed
