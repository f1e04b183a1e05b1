"""Device facts and the one policy over them: the one file that names CUDA or MPS."""

import re
import resource
import sys
import time
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmscale.config.schema import EngineConfig
from mmscale.errors import ConfigError

# Preset towers that are known to fail on a device, and what works there in their place. BERT
# fine-tunes wrongly on MPS without a word (github.com/pytorch/pytorch/issues/82707).
FAILING_TOWERS: dict[str, dict[str, str]] = {
    "mps": {"hf:google-bert/bert-base-uncased": "hf:albert/albert-base-v2"}
}
# A dtype in which either takes so many times as long as in fp32 is not worth its rounding.
WORTHLESS = 1.5
TF32_CAPABILITY = FLASH_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Gpu:
    """A CUDA device: its name, its compute capability, and whether it computes in bf16 itself."""

    name: str
    capability: tuple[int, int]
    bf16: bool


@dataclass(frozen=True)
class Machine:
    """The accelerators that this process sees."""

    gpus: tuple[Gpu, ...] = ()
    mps: bool = False


@dataclass(frozen=True)
class DevicePolicy:
    """Where a rank computes and how.

    Attributes:
        device: This rank's device.
        dtype: Dtype of matrix products; parameters and losses stay in fp32.
        reason: Why this dtype, for the log.
        backend: `torch.distributed` backend for the device.
        tf32: Products of fp32 matrices may be rounded to TF32's 10 bits.
        fused_optimizer: AdamW runs as one kernel.
        attention: What torch's attention runs on where a mask allows it, for the log.
        failing_towers: Preset towers that fail here, and their stand-ins.
        has_gaps: Torch lacks some operations here.
        peak_flops: What the device computes at most in this precision; None where unknown.
        runs_ahead: The host goes on while the device computes.
    """

    device: torch.device
    dtype: torch.dtype
    reason: str
    backend: str
    tf32: bool = False
    fused_optimizer: bool = True
    attention: str = "flash"
    failing_towers: Mapping[str, str] = field(default_factory=dict)
    has_gaps: bool = False
    peak_flops: float | None = None
    runs_ahead: bool = False

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        products = ", TF32 products" if self.tf32 else ""
        optimizer = "fused" if self.fused_optimizer else "plain"
        return (
            f"{self.device}, {dtype}{products} ({self.reason}), {optimizer} AdamW, "
            f"{self.attention} attention"
        )


def this_machine() -> Machine:
    """What torch finds here."""
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    gpus = tuple(
        Gpu(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index), bf16)
        for index in range(torch.cuda.device_count())
    )
    return Machine(gpus, torch.backends.mps.is_available())


def has_tensor_cores() -> bool:
    """Whether this process's CUDA device multiplies in bf16 and TF32."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= TF32_CAPABILITY


def choose(config: EngineConfig, local_rank: int = 0) -> DevicePolicy:
    """Pick the device and precision that `config` allows and the machine has, and apply them.

    Raises:
        ConfigError: The device is not there, or it does not compute in the precision asked for.
    """
    policy = plan_device(config, local_rank, this_machine())
    if policy.device.type == "cpu" and policy.dtype != torch.float32:
        policy = replace(policy, reason=f"{policy.reason}; {_costs(policy.dtype)}")
    if policy.device.type == "cuda":
        torch.cuda.set_device(policy.device)
    # Convolutions take TF32 by torch's default, which is not what fp32 means here.
    torch.backends.cuda.matmul.allow_tf32 = policy.tf32
    torch.backends.cudnn.allow_tf32 = policy.tf32
    # Convolutions see one size of pictures for a whole stage.
    torch.backends.cudnn.benchmark = policy.device.type == "cuda"
    return policy


def _costs(dtype: torch.dtype) -> str:
    """What a small product and a small convolution cost on this CPU, measured in milliseconds.

    A CPU without units for a dtype computes in it all the same, a hundred times slower.
    """
    matrix, images = torch.full((128, 128), 0.5), torch.full((2, 16, 28, 28), 0.5)
    kernels = torch.full((16, 16, 3, 3), 0.1)

    def seconds(dtype: torch.dtype) -> tuple[float, float]:
        rows, pixels, weights = matrix.to(dtype), images.to(dtype), kernels.to(dtype)
        return (
            _least_seconds(lambda: rows @ rows),
            _least_seconds(lambda: torch.conv2d(pixels, weights, padding=1)),
        )

    product, convolution = (
        mine / plain for mine, plain in zip(seconds(dtype), seconds(torch.float32), strict=True)
    )
    advice = "; fp32 is faster here" if max(product, convolution) > WORTHLESS else ""
    return (
        f"a product takes {product:.2g} times as long as in fp32, a convolution "
        f"{convolution:.2g} times{advice}"
    )


def _least_seconds(work: Callable[[], object]) -> float:
    spent = []
    with torch.inference_mode():
        for _ in range(4):
            start = time.perf_counter()
            work()
            spent.append(time.perf_counter() - start)
    return min(spent)


def plan_device(config: EngineConfig, local_rank: int, machine: Machine) -> DevicePolicy:
    """The policy for a machine, without touching it."""
    kind = device_kind(config, machine)
    gpu = None
    if kind == "cuda":
        if local_rank >= len(machine.gpus):
            raise ConfigError(
                f"engine.device=cuda: local rank {local_rank} has no GPU, the machine shows "
                f"{len(machine.gpus)}; start at most one rank a GPU"
            )
        gpu = machine.gpus[local_rank]
    dtype, reason = _dtype(config.precision, kind, gpu)
    flash = gpu is not None and gpu.capability >= FLASH_CAPABILITY and dtype != torch.float32
    return DevicePolicy(
        device=torch.device(kind, local_rank) if gpu else torch.device(kind),
        dtype=dtype,
        reason=reason,
        # Small agreements are made on the CPU, whatever the rows are gathered on.
        backend="cpu:gloo,cuda:nccl" if gpu else "gloo",
        tf32=config.precision == "tf32",
        fused_optimizer=kind != "mps",
        attention={
            "cuda": "flash" if flash else "memory-efficient",
            "mps": "plain",
            "cpu": "flash",
        }[kind],
        failing_towers=FAILING_TOWERS.get(kind, {}),
        has_gaps=kind == "mps",
        peak_flops=_peak(gpu, dtype, config.precision),
        runs_ahead=gpu is not None,
    )


def _peak(gpu: Gpu | None, dtype: torch.dtype, precision: str) -> float | None:
    names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    products = "tf32" if precision == "tf32" else names.get(dtype, "fp32")
    return None if gpu is None else peak_flops(gpu.name, products)


def memory_peak(device: torch.device) -> int:
    """Most bytes that this process has held: on the device, or at all where that is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    high = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in kibibytes.
    return high if sys.platform == "darwin" else 1024 * high


def device_kind(config: EngineConfig, machine: Machine) -> str:
    """`cuda`, `mps` or `cpu`.

    Raises:
        ConfigError: The device that was asked for is not there.
    """
    present = {"cuda": bool(machine.gpus), "mps": machine.mps, "cpu": True}
    if config.device == "auto":
        return next(kind for kind, there in present.items() if there)
    if not present[config.device]:
        raise ConfigError(
            f"engine.device={config.device}: this machine has no such device; set "
            f"engine.device=cpu or auto"
        )
    return config.device


def _dtype(precision: str, kind: str, gpu: Gpu | None) -> tuple[torch.dtype, str]:
    if precision == "auto":
        if gpu is not None and gpu.bf16:
            return torch.bfloat16, f"the {gpu.name} computes in bf16"
        what = f"the {gpu.name}" if gpu else kind
        return torch.float32, f"{what} has no fast bf16 that we know of"
    if precision == "fp16" and gpu is None:
        raise ConfigError(f"engine.precision=fp16 needs a CUDA device, this is {kind}; use fp32")
    if precision == "bf16" and kind == "mps":
        raise ConfigError("engine.precision=bf16 is not known to train on mps; use fp32")
    if precision == "bf16" and gpu is not None and not gpu.bf16:
        raise ConfigError(
            f"engine.precision=bf16: the {gpu.name} only imitates it, slower than fp32; use fp16 "
            f"or fp32"
        )
    if precision == "tf32" and (gpu is None or gpu.capability < TF32_CAPABILITY):
        raise ConfigError(
            f"engine.precision=tf32 needs a CUDA device of compute capability 8.0 or more, this is "
            f"{gpu.name if gpu else kind}; use fp32"
        )
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return dtypes.get(precision, torch.float32), f"engine.precision={precision}"


def send(rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Rows on `device`; a CUDA device fetches them while this process goes on."""
    if device.type != "cuda":
        return rows.to(device)
    return rows.pin_memory().to(device, non_blocking=True)


def exact_device(device: torch.device) -> torch.device:
    """Where sums in float64 are made that belong to what is on `device`: MPS has none."""
    return torch.device("cpu") if device.type == "mps" else device


class Arriving:
    """Numbers on their way from a device to this process.

    Args:
        numbers: A vector.
    """

    def __init__(self, numbers: torch.Tensor):
        self._event: torch.Event | None = None
        self._numbers = numbers
        if numbers.device.type == "cuda":
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._event = torch.Event(device=numbers.device)
            self._event.record()

    def read(self) -> list[float]:
        """The numbers; waits for the device to have come to them."""
        if self._event is not None:
            self._event.synchronize()
        found: list[float] = self._numbers.tolist()
        return found


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


# Dispatch keys under which an operation is there for every device.
_COMPOSITE = ("CompositeImplicitAutograd", "CompositeExplicitAutograd")


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.seen.add(str(func._schema.name) + _overload(func))
        return func(*args, **(kwargs or {}))


def _overload(func: Any) -> str:
    return "." + str(func._schema.overload_name) if func._schema.overload_name else ""


def operations(run: Callable[[], Any]) -> set[str]:
    """Names of the operations that `run` dispatches, such as `aten::convolution_backward`."""
    recorder = _Recorder()
    with recorder:
        run()
    return recorder.seen


def has_kernel(operation: str, device: str) -> bool:
    """Whether torch has the operation for this kind of device."""
    keys = (device.upper(), *_COMPOSITE)
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(operation, key) for key in keys)


def fall_back_line(
    used: Collection[str], device: str, there: Callable[[str, str], bool] = has_kernel
) -> str | None:
    """The one warning for what runs on the CPU; torch's own, one a run, would name the first only.

    Args:
        used: Operations of the model.
        device: Kind of device.
        there: Whether a device has an operation.
    """
    lacking = sorted(name for name in used if not there(name, device))
    if not lacking:
        return None
    warnings.filterwarnings("ignore", message=".*will fall back to run on the CPU")
    return f"{device} lacks {', '.join(lacking)}: run on the CPU, with copies each way"


_H100_SXM = {"bf16": 989.0, "fp16": 989.0, "tf32": 494.7, "fp32": 67.0}
_PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    (r"H100 PCIe", {"bf16": 756.0, "fp16": 756.0, "tf32": 378.0, "fp32": 51.0}),
    (r"H100 NVL", {"bf16": 835.5, "fp16": 835.5, "tf32": 417.5, "fp32": 60.0}),
    (r"H100", _H100_SXM),
    (r"H200 NVL", {"bf16": 835.5, "fp16": 835.5, "tf32": 417.5, "fp32": 60.0}),
    (r"H200", _H100_SXM),
    (r"A100", {"bf16": 312.0, "fp16": 312.0, "tf32": 156.0, "fp32": 19.5}),
    (r"L40S", {"bf16": 362.05, "fp16": 362.05, "tf32": 183.0, "fp32": 91.6}),
    (r"L4$", {"bf16": 121.0, "fp16": 121.0, "tf32": 60.0, "fp32": 30.3}),
    (r"T4$", {"fp16": 65.0, "fp32": 8.1}),
    (r"V100-SXM2", {"fp16": 125.0, "fp32": 15.7}),
)


def peak_flops(name: str, precision: str) -> float | None:
    """FLOP/s of a GPU by the name that its driver gives; None where it is not known.

    Args:
        name: Such as `NVIDIA A100-SXM4-80GB`.
        precision: `bf16`, `fp16`, `tf32` or `fp32`.
    """
    for pattern, peaks in _PEAKS:
        if re.search(rf"\b{pattern}", name):
            tera = peaks.get(precision)
            return None if tera is None else 1e12 * tera
    return None
