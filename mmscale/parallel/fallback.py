"""What happens where a device cannot do what a run needs: MPS, whose operations have gaps."""

import warnings
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
