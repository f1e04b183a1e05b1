"""What a rank really holds and sends: walked and listened to, not computed."""

import gc
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


class Storages:
    """Distinct storages of tensors that this process holds, in bytes."""

    def __init__(self, ignored: "Storages | None" = None):
        """Walk every tensor that Python knows.

        Args:
            ignored: Storages that were there before.
        """
        gc.collect()
        before = ignored.sizes if ignored else {}
        self.sizes = {key: size for key, size in _walk() if before.get(key) != size}

    def take(self, tensors: Any) -> int:
        """Bytes of these tensors' storages, each counted once over all calls."""
        keys = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        return sum(self.sizes.pop(key, 0) for key in keys)

    @property
    def left(self) -> int:
        """Bytes that nobody took."""
        return sum(self.sizes.values())


def _walk() -> Iterator[tuple[int, int]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for thing in gc.get_objects():
            # What a DTensor holds is a tensor that Python knows too.
            if not isinstance(thing, Tensor) or isinstance(thing, DTensor) or thing.is_meta:
                continue
            storage = thing.untyped_storage()
            if storage.nbytes():
                yield storage.data_ptr(), storage.nbytes()
            if thing.is_leaf and thing.grad is not None:
                storage = thing.grad.untyped_storage()
                yield storage.data_ptr(), storage.nbytes()


@contextmanager
def listening() -> Iterator[Counter[tuple[str, str]]]:
    """Count calls and payload bytes of each collective: keys (collective, `times` or `bytes`)."""
    heard: Counter[tuple[str, str]] = Counter()
    # Not every torch has all of them.
    kept = {name: getattr(dist, name) for name in _COLLECTIVES if hasattr(dist, name)}

    def listener(name: str) -> Any:
        kind, whole = _COLLECTIVES[name]

        def call(*args: Any, **words: Any) -> Any:
            tensors = args[whole] if len(args) > whole else words[_WORDS[name]]
            size = sum(t.nbytes for t in tensors) if isinstance(tensors, list) else tensors.nbytes
            heard[kind, "times"] += 1
            heard[kind, "bytes"] += size
            return kept[name](*args, **words)

        return call

    for name in kept:
        setattr(dist, name, listener(name))
    try:
        yield heard
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)


# Collective, and which argument is the whole payload.
_COLLECTIVES = {
    "all_gather_into_tensor": ("all-gather", 0),
    "all_gather_single": ("all-gather", 0),
    "all_gather": ("all-gather", 0),
    "_all_gather_base": ("all-gather", 0),
    "reduce_scatter_tensor": ("reduce-scatter", 1),
    "_reduce_scatter_base": ("reduce-scatter", 1),
    "reduce_scatter_single": ("reduce-scatter", 1),
    "reduce_scatter": ("reduce-scatter", 1),
    "all_reduce": ("all-reduce", 0),
    "reduce": ("reduce", 0),
    "broadcast": ("broadcast", 0),
}
_WORDS = {
    "all_gather_into_tensor": "output_tensor",
    "all_gather_single": "output_tensor",
    "all_gather": "tensor_list",
    "_all_gather_base": "output_tensor",
    "reduce_scatter_tensor": "input",
    "_reduce_scatter_base": "input",
    "reduce_scatter_single": "input",
    "reduce_scatter": "input_list",
    "all_reduce": "tensor",
    "reduce": "tensor",
    "broadcast": "tensor",
}
