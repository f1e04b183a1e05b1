"""The engine for one device: accelerate's choice of it, precision and loss scaling."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from mmscale.config.schema import Config
from mmscale.contracts import NamedTensor, World
from mmscale.engine.casts import Casts
from mmscale.engine.ema import Replica
from mmscale.engine.optimizer import (
    decide_on_device,
    decides_on_device,
    optimizer_kind,
    parameter_groups,
    persistent_buffers,
    set_rates,
    trained_parts,
)
from mmscale.engine.protocol import Shadow
from mmscale.parallel.device import DevicePolicy
from mmscale.parallel.world import check_world

_PRECISIONS = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}


class AccelerateEngine:
    """The whole model on one device."""

    def __init__(self, model: nn.Module, config: Config, policy: DevicePolicy, world: World):
        self._accelerator = Accelerator(
            cpu=policy.device.type == "cpu", mixed_precision=_PRECISIONS[policy.dtype]
        )
        check_world(world, self._accelerator.num_processes, "accelerate")
        self.label = "accelerate"
        self.device = policy.device
        self.module = model.to(policy.device)
        self._casts = Casts(policy.device, policy.dtype)
        self._clip = config.optim.clip_norm
        self._parts = trained_parts(model)
        groups = parameter_groups(model, config.optim)
        self._kind = optimizer_kind(config.optim, policy.fused_optimizer, sharded=False)
        optimizer = self._kind.build(groups)
        can_skip = self._accelerator.scaler is None and decides_on_device(optimizer)
        self.decides_on_device = policy.runs_ahead and can_skip
        self._optimizer = self._accelerator.prepare_optimizer(optimizer)
        # accelerate loads the optimizer's state anew: these are the groups that it goes by.
        self.groups: list[dict[str, Any]] = self._optimizer.param_groups

    def call(self, mode: str, *inputs: Any) -> Any:
        with self._casts.forward():
            return self.module(mode, *inputs)

    def begin_update(self) -> None:
        self._casts.begin()
        self._optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor, last: bool, scaled: bool = False) -> None:
        if scaled:
            loss.backward()
        else:
            self._accelerator.backward(loss)
        if not last:
            return
        self._casts.end()
        trained = [p for part in self._parts.values() for p in part]
        for parameter in trained:
            # The optimizer would pass over what took no part in this update: in sharded gradients
            # it is zero.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def part_norms(self) -> Float[Tensor, " parts"]:
        if self._accelerator.scaler is not None:
            self._accelerator.unscale_gradients(self._optimizer)
        zero = torch.zeros((), device=self.device)
        squares = [
            torch.as_tensor(sum((_square(p.grad) for p in part if p.grad is not None), zero))
            for part in self._parts.values()
        ]
        return torch.stack(squares)

    def apply(
        self, factor: float, total_norm: float | Tensor, applied: Tensor | None = None
    ) -> None:
        set_rates(self._optimizer.param_groups, factor)
        if applied is not None:
            decide_on_device(self._optimizer.optimizer, total_norm, self._clip, applied)
        elif self._clip is not None and total_norm > self._clip:
            gradients = [
                p.grad for part in self._parts.values() for p in part if p.grad is not None
            ]
            torch._foreach_mul_(gradients, self._clip / (total_norm + 1e-6))
        self._optimizer.step()

    def skip_update(self) -> None:
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.update()

    def masters(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                yield name, parameter.detach()

    def cut(self, name: str, whole: Tensor) -> Tensor:
        return whole

    def pull(self, added: Iterable[tuple[str, Tensor]], factor: float) -> None:
        if self._accelerator.scaler is not None:
            factor *= self._accelerator.scaler.get_scale()
        for name, value in added:
            gradient = self.module.get_parameter(name).grad
            assert gradient is not None, "the update's last backward comes first"
            gradient.add_(value, alpha=factor)

    def tensors(self) -> Iterator[NamedTensor]:
        state = self._optimizer.optimizer.state
        for name, parameter in self.module.named_parameters():
            moments = {}
            if parameter.requires_grad:
                moments = {
                    key: state[parameter][key]
                    for key in self._kind.moments
                    if key in state[parameter]
                }
            yield NamedTensor(name, parameter.detach(), moments, parameter.requires_grad)
        for name, buffer in persistent_buffers(self.module):
            yield NamedTensor(name, buffer, {})

    def shadow(self, module: nn.Module) -> Shadow:
        return Replica(module, self.module, self.device)

    def scaler(self) -> dict[str, float]:
        scaler = self._accelerator.scaler
        return {} if scaler is None else dict(scaler.state_dict())

    def restore(
        self,
        moments: Callable[[str], dict[str, Tensor]],
        updates: int,
        scaler: dict[str, float],
    ) -> None:
        if scaler and self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(scaler)
        state = self._optimizer.optimizer.state
        for name, parameter in self.module.named_parameters():
            found = moments(name) if parameter.requires_grad else {}
            if found:
                own = {key: value.to(parameter.device).clone() for key, value in found.items()}
                state[parameter] = self._kind.state(parameter, own, updates)
        self._kind.resume(self._optimizer.optimizer, updates)

    def close(self) -> None:
        self._casts.end()
        self._accelerator.free_memory()


def _square(gradient: Tensor) -> Tensor:
    return gradient.float().pow(2).sum() if gradient.dtype.itemsize < 4 else gradient.pow(2).sum()
