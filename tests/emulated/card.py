"""A card that is not there: tensors that say `cuda:0` and hold real numbers on the CPU.

What a CUDA device refuses is refused here: an operation on tensors of both devices, a generator of
the other device. What makes the host wait for it is counted with the lines of mmscale that asked
for it: a value read, a copy to or from memory that is not pinned, a result whose size depends on
values, an event waited for. So whole runs show on a machine without a card where they would fail
on one, and how often they would wait.

It sees nothing of streams, of kernels that a card lacks, of rounding, of NCCL or of DeepSpeed.
`install` changes torch for the whole process: use it in a process of its own.
"""

import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CARD = torch.device("cuda", 0)
CPU = torch.device("cpu")
# Operations whose result has a size, or a check, that only the values tell.
_WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "masked_select",
    "equal",
    "is_nonzero",
    "bincount",
    "repeat_interleave",
    "_linalg_check_errors",
    "_linalg_eigh",
    "_linalg_svd",
}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
# These take a tensor of the other device; all others a number in a tensor without axes at most.
_CROSSING = {"_to_copy", "copy_", *_INDEXING}


class Waits:
    """What made the host wait, by operation and caller.

    Attributes:
        phase: Name under which it is counted.
        found: How often, by phase, operation and the lines that asked for it.
    """

    def __init__(self) -> None:
        self.phase = ""
        self.found: Counter[tuple[str, str, str]] = Counter()

    def note(self, operation: str) -> None:
        """Count one; what another thread waits for is counted under its name."""
        thread = threading.current_thread()
        phase = self.phase if thread is threading.main_thread() else thread.name
        self.found[phase, operation, _callers()] += 1


waits = Waits()
# The latest of it: what is sent at once is not looked at again.
_pinned_memory: deque[torch.UntypedStorage] = deque(maxlen=1000)


def _callers() -> str:
    """The innermost lines of the packages that a trainer is made of."""
    packages = ("/mmscale/", "/accelerate/", "/transformers/", "/torch/optim/", "/open_clip/")
    frames = [
        f"{frame.filename.rsplit('/', 2)[-2]}/{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}"
        for frame in traceback.extract_stack()
        if any(package in frame.filename for package in packages)
    ]
    return " < ".join(reversed(frames[-4:]))


class OnCard(torch.Tensor):
    """A tensor that says it lies on the card."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "OnCard":
        # torch's own C++ takes it for one of the CPU: it has no card to ask.
        made: OnCard = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), dtype=held.dtype, device="cpu"
        )
        made.held = held
        return made

    def __init__(self, held: torch.Tensor):
        super().__init__()

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CARD

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    def tolist(self) -> Any:
        waits.note("tolist")
        return self.held.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("a tensor of the card has no numpy array; copy it to the CPU first")

    __array__ = numpy

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def record_stream(self, stream: Any) -> None:
        pass

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.ndim == 0 else repr(self)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnCard({self.held!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "OnCard":
        if id(self) not in memo:
            copied = OnCard(self.held.detach().clone()).requires_grad_(self.requires_grad)
            if getattr(self, "_is_param", False):
                copied._is_param = True
            memo[id(self)] = copied
        found: OnCard = memo[id(self)]
        return found

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation: checked, counted, and computed on what the tensors hold."""
    name = func._schema.name.split("::")[1]
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, OnCard)]
    wanted = kwargs.get("device")
    if wanted is not None and torch.device(wanted).type == "cuda":
        kwargs = {**kwargs, "device": CPU}
        to_card = True
    elif not ours:
        return _pinned(func, args, kwargs)
    else:
        # torch asks for the device that its C++ sees; `_Function` has handled every true move.
        to_card = True
    _check(func, name, tensors, ours, kwargs)
    _count(func, name, args, kwargs, bool(ours))
    found = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    return _outer(func, name, tensors, found) if to_card else found


def _pinned(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation of the CPU alone; pinned memory is plain memory with a mark."""
    if not kwargs.get("pin_memory"):
        return func(*args, **kwargs)
    made: torch.Tensor = func(*args, **{**kwargs, "pin_memory": False})
    _pinned_memory.append(made.untyped_storage())
    return made


def _is_pinned(rows: torch.Tensor) -> bool:
    place = rows.untyped_storage().data_ptr()
    return any(memory.data_ptr() == place for memory in _pinned_memory)


def _check(
    func: Any,
    name: str,
    tensors: list[torch.Tensor],
    ours: list[OnCard],
    kwargs: dict[str, Any],
) -> None:
    strangers = [tensor for tensor in tensors if not isinstance(tensor, OnCard) and tensor.ndim > 0]
    if ours and strangers and name not in _CROSSING:
        shapes = [tuple(stranger.shape) for stranger in strangers]
        raise RuntimeError(f"{func}: tensors of the card and of the CPU, the latter {shapes}")
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type == "cpu":
        raise RuntimeError(f"{func}: a generator of the CPU for a tensor of the card")


def _count(func: Any, name: str, args: Any, kwargs: dict[str, Any], any_ours: bool) -> None:
    if name in _WAITING and any_ours:
        waits.note(name)
    if name in _INDEXING:
        for index in args[1]:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                waits.note("boolean index")
            if isinstance(args[0], OnCard) and index is not None and not isinstance(index, OnCard):
                waits.note("index from the CPU")
    if name == "copy_":
        _count_copy(args[0], args[1], args[2] if len(args) > 2 else kwargs.get("non_blocking"))
    if name == "_to_copy" and not any_ours:
        _count_move(args[0], bool(kwargs.get("non_blocking")), "to the card")


def _count_copy(target: torch.Tensor, source: torch.Tensor, without_waiting: Any) -> None:
    if isinstance(target, OnCard) != isinstance(source, OnCard):
        other = source if isinstance(target, OnCard) else target
        way = "to the card" if isinstance(target, OnCard) else "to the CPU"
        _count_move(other, bool(without_waiting), way)


def _count_move(on_cpu: torch.Tensor, without_waiting: bool, way: str) -> None:
    if on_cpu.numel() and not (without_waiting and _is_pinned(on_cpu)):
        waits.note(f"copy {way}")


def _inner(value: Any) -> Any:
    return value.held if isinstance(value, OnCard) else value


def _outer(func: Any, name: str, tensors: list[torch.Tensor], found: Any) -> Any:
    """What an operation gave, on the card; what it wrote to is what it was."""
    writes = [a for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
    known = {id(_inner(tensor)): tensor for tensor in tensors} if writes else {}

    def outer(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, OnCard):
            return value
        return known.get(id(value)) if id(value) in known else OnCard(value)

    return tree_map(outer, found)


class _Upload(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        return OnCard(rows.detach().clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _inner(gradients[0])


class _Download(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Any) -> torch.Tensor:
        held: torch.Tensor = rows.held.detach().clone()
        return held

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return OnCard(gradients[0])


class _Function(TorchFunctionMode):
    """Moves between the devices, which torch's C++ would take for none."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _MOVES.get(func)
        return func(*args, **kwargs) if handler is None else handler(func, args, kwargs)


def _move(rows: torch.Tensor, device: Any, without_waiting: bool) -> torch.Tensor:
    kind = torch.device(device).type
    if kind == "cuda" and not isinstance(rows, OnCard):
        _count_move(rows, without_waiting, "to the card")
        rows = _Upload.apply(rows)
    elif kind == "cpu" and isinstance(rows, OnCard):
        waits.note("copy to the CPU")
        rows = _Download.apply(rows)
    return rows


def _to(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    rows, *rest = args
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    for value in rest:
        if isinstance(value, torch.Tensor):
            device, dtype = value.device, value.dtype
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, str | torch.device):
            device = value
    if device is not None and torch.device(device).type == "meta":
        return func(*args, **kwargs)
    moved = rows
    if device is not None:
        moved = _move(rows, device, bool(kwargs.get("non_blocking")))
    if dtype is not None and dtype != moved.dtype:
        return func(moved, dtype)
    return moved.clone() if kwargs.get("copy") and moved is rows else moved


def _cpu(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return _move(args[0], CPU, without_waiting=False)


def _pin(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    pinned: torch.Tensor = args[0].clone()
    _pinned_memory.append(pinned.untyped_storage())
    return pinned


def _tensor(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """`torch.tensor` and the like: made on the CPU, then sent, which waits."""
    device = kwargs.get("device")
    if device is None or torch.device(device).type != "cuda":
        return func(*args, **kwargs)
    if isinstance(args[0], OnCard):
        dtype = kwargs.get("dtype")
        return args[0] if dtype in (None, args[0].dtype) else args[0].to(dtype)
    rest = {name: value for name, value in kwargs.items() if name != "device"}
    waits.note("copy to the card")
    return OnCard(func(*args, **rest))


def _new_tensor(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if not isinstance(args[0], OnCard):
        return func(*args, **kwargs)
    waits.note("copy to the card")
    return OnCard(func(args[0].held, *args[1:], **kwargs))


def _list(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if isinstance(args[0], OnCard):
        waits.note("tolist")
        return args[0].held.tolist()
    return func(*args, **kwargs)


_MOVES: dict[Any, Callable[[Any, Any, dict[str, Any]], Any]] = {
    torch.Tensor.to: _to,
    torch.Tensor.cpu: _cpu,
    torch.Tensor.pin_memory: _pin,
    torch.Tensor.tolist: _list,
    torch.Tensor.new_tensor: _new_tensor,
    torch.tensor: _tensor,
    torch.as_tensor: _tensor,
}


class _Stream:
    """All work is done at once, so that none needs another stream."""

    def __init__(self, device: Any = None):
        self.device = device

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass


class _Event:
    """Of a stream that has always come to it."""

    def __init__(self, device: Any = None, enable_timing: bool = False):
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        waits.note("event")

    def elapsed_time(self, other: "_Event") -> float:
        return 1.0


def _by_device_and_dtype(lists: Any, with_indices: bool = False) -> Any:
    """torch's grouping asks its C++ for the device; all of these lie on one."""
    groups: dict[Any, Any] = {}
    for place, first in enumerate(lists[0]):
        lists_of, places = groups.setdefault((first.device, first.dtype), ([[] for _ in lists], []))
        for kept, values in zip(lists_of, lists, strict=True):
            if values:
                kept.append(values[place])
        places.append(place)
    return groups


def install() -> None:
    """Give this process the card."""
    cuda: Any = torch.cuda
    cuda._lazy_init = lambda: None
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: None
    cuda.set_device = lambda device: None
    cuda.current_device = lambda: 0
    cuda.max_memory_allocated = lambda device=None: 0
    torch.Event = _Event  # type: ignore[misc]
    torch.Stream = _Stream  # type: ignore[misc]
    torch.accelerator.current_stream = _Stream  # type: ignore[assignment]
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    optimizer: Any = torch.optim.Optimizer
    optimizer._group_tensors_by_device_and_dtype = staticmethod(_by_device_and_dtype)
    start = torch.autocast.__init__

    def autocast(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        start(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    torch.autocast.__init__ = autocast  # type: ignore[method-assign]
    _Dispatch().__enter__()
    _Function().__enter__()
    run = threading.Thread.run

    def on_card(self: threading.Thread) -> None:
        with _Dispatch(), _Function():
            run(self)

    threading.Thread.run = on_card  # type: ignore[method-assign]
