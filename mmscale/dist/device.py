"""Device facts: the one file that names CUDA or MPS."""

from dataclasses import dataclass

import torch

from mmscale.config.schema import EngineConfig
from mmscale.errors import ConfigError


@dataclass(frozen=True)
class DevicePolicy:
    """Where a rank computes and in which precision.

    Attributes:
        device: This rank's device.
        dtype: Dtype of matrix products; parameters and losses stay in fp32.
        reason: Why this dtype, for the log.
        backend: `torch.distributed` backend for the device.
    """

    device: torch.device
    dtype: torch.dtype
    reason: str
    backend: str


def choose(config: EngineConfig, local_rank: int = 0) -> DevicePolicy:
    """Pick the device and precision that `config` allows and the machine has.

    Raises:
        ConfigError: The device is not there, or it does not compute in the precision asked for.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    kind = config.device
    if kind == "auto":
        kind = "cuda" if present["cuda"] else "mps" if present["mps"] else "cpu"
    elif kind != "cpu" and not present[kind]:
        raise ConfigError(
            f"engine.device={kind}: this machine has no such device; set engine.device=cpu or auto"
        )
    device = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"engine.device=cuda: local rank {local_rank} has no GPU, the machine shows "
                f"{torch.cuda.device_count()}; start at most one rank a GPU"
            )
        torch.cuda.set_device(device)
    dtype, reason = _dtype(config.precision, kind)
    # Small agreements are made on the CPU, whatever the rows are gathered on.
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    return DevicePolicy(device, dtype, reason, backend)


def _dtype(precision: str, kind: str) -> tuple[torch.dtype, str]:
    if precision == "auto":
        if kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU computes in bf16"
        return torch.float32, f"{kind} has no fast bf16 that we know of"
    if precision == "fp16" and kind != "cuda":
        raise ConfigError(f"engine.precision=fp16 needs a CUDA device, this is {kind}; use fp32")
    if precision == "bf16" and kind == "mps":
        raise ConfigError("engine.precision=bf16 is not known to train on mps; use fp32")
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return dtypes[precision], f"engine.precision={precision}"


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """State of the generators that a forward on `device` draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_rng_state(device: torch.device, states: dict[str, torch.Tensor]) -> None:
    """Put back what `rng_state` gave; states of other devices are ignored."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])
