"""The one gather of the project and its reductions.

Convention of the gradients, held by every loss: engines average gradients over ranks; each rank
returns the loss of its own rows averaged over b; backward of `columns` and `total` therefore sums
over ranks. The mean of the ranks' losses is the loss of the global batch, and the averaged gradient
is its gradient.
"""

import json
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import UInt8
from safetensors.torch import load, save
from torch import Tensor

from mmscale.contracts import Peers, World
from mmscale.parallel.phases import phase


class Alone:
    """Peers of a single process."""

    rank = 0
    size = 1

    def columns(self, rows: Tensor) -> Tensor:
        return rows

    def total(self, value: Tensor) -> Tensor:
        return value

    def logsumexp(self, value: Tensor) -> Tensor:
        return value

    def first_row(self, num_rows: int) -> int:
        return 0


class Group:
    """Peers of the joined ranks; all of them must call the same methods in the same order."""

    def __init__(self, world: World):
        self.rank = world.rank
        self.size = world.size

    def columns(self, rows: Tensor) -> Tensor:
        if rows.dtype.is_floating_point:
            columns: Tensor = _Columns.apply(rows, self.rank, self.size)
            return columns
        return _gather(rows, self.size)

    def total(self, value: Tensor) -> Tensor:
        total: Tensor = _Total.apply(value)
        return total

    def logsumexp(self, value: Tensor) -> Tensor:
        top = value.detach().clone()
        with phase("communication"):
            dist.all_reduce(top, dist.ReduceOp.MAX)
        # A row that is -inf on every rank (nothing to sum) must stay -inf, not become NaN.
        top = torch.where(top.isfinite(), top, torch.zeros_like(top))
        return top + self.total((value - top).exp()).log()

    def first_row(self, num_rows: int) -> int:
        return self.rank * num_rows


def connect(world: World) -> Peers:
    """The peers of a joined world."""
    return Group(world) if dist.is_initialized() and world.size > 1 else Alone()


# Bytes of one broadcast: gloo counts in 32 bits.
SENT_AT_ONCE = 1 << 28


def broadcast_object(world: World, value: Any) -> Any:
    """Rank 0's value, on every rank: JSON with tensors in it (`parallel/message.py`)."""
    if not dist.is_initialized() or world.size == 1:
        return value
    content = packed(value) if world.rank == 0 else torch.empty(0, dtype=torch.uint8)
    length = torch.tensor([len(content)])
    dist.broadcast(length, 0)
    if world.rank != 0:
        content = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(content, 0)
    return unpacked(content)


def gather_objects(world: World | Peers, value: Any) -> list[Any]:
    """Every rank's value, on every rank, in rank order: JSON with tensors in it."""
    if not dist.is_initialized() or world.size == 1:
        return [value]
    content = packed(value)
    lengths = torch.empty(world.size, dtype=torch.long)
    dist.all_gather_into_tensor(lengths, torch.tensor([len(content)]))
    most = int(lengths.max())
    everyone = torch.empty(world.size * most, dtype=torch.uint8)
    dist.all_gather_into_tensor(everyone, F.pad(content, (0, most - len(content))))
    parts = zip(everyone.split(most), lengths.tolist(), strict=True)
    return [unpacked(part[:length]) for part, length in parts]


def gather_rows(world: World | Peers, rows: Tensor) -> Tensor:
    """Every rank's rows, of which each may have another number, on every rank in rank order.

    Each rank sends its rows to their place, so that nothing is held besides the result. Collective.

    Args:
        world: All ranks.
        rows: [m ...], on the CPU; all ranks' alike but for m.
    """
    if not dist.is_initialized() or world.size == 1:
        return rows
    counts = torch.empty(world.size, dtype=torch.long)
    dist.all_gather_into_tensor(counts, torch.tensor([len(rows)]))
    found = rows.new_empty(int(counts.sum()), *rows.shape[1:])
    at_once = max(1, SENT_AT_ONCE // max(1, found[:1].nbytes))
    for rank, part in enumerate(found.split(counts.tolist())):
        if rank == world.rank:
            part.copy_(rows)
        for piece in part.split(at_once) if len(part) else ():
            dist.broadcast(piece, rank)
    return found


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized():
        dist.barrier()


def _gather(rows: Tensor, size: int) -> Tensor:
    with phase("communication"):
        columns = rows.new_empty((rows.shape[0] * size, *rows.shape[1:]))
        dist.all_gather_into_tensor(columns, rows.contiguous())
        return columns


class _Columns(torch.autograd.Function):
    """All-gather whose backward is a reduce-scatter by sum."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, rank: int, size: int) -> Tensor:
        ctx.num_rows = rows.shape[0]
        return _gather(rows, size)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradients[0].contiguous()
        own = gradient.new_empty((ctx.num_rows, *gradient.shape[1:]))
        with phase("communication"):
            dist.reduce_scatter_tensor(own, gradient)
        return own, None, None


class _Total(torch.autograd.Function):
    """All-reduce by sum whose backward is the same."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        value = value.clone()
        with phase("communication"):
            dist.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone()
        with phase("communication"):
            dist.all_reduce(gradient)
        return gradient


_TEXT, _TENSOR = "text", "tensor of this message"


def packed(value: Any) -> UInt8[Tensor, " bytes"]:
    """A value as bytes.

    Args:
        value: Of what JSON has, and tensors. Tuples arrive as lists, keys as text.
    """
    tensors: dict[str, Tensor] = {}

    def stand_in(thing: Any) -> dict[str, str]:
        if not isinstance(thing, Tensor):
            raise TypeError(f"ranks exchange JSON and tensors, not {type(thing).__name__}")
        name = str(len(tensors))
        # Of its own: two views of one storage are refused.
        tensors[name] = thing.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: name}

    text = json.dumps(value, default=stand_in).encode()
    tensors[_TEXT] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return torch.frombuffer(bytearray(save(tensors)), dtype=torch.uint8)


def unpacked(content: UInt8[Tensor, " bytes"]) -> Any:
    """The value that `packed` was given; its tensors are on the CPU."""
    tensors = load(content.numpy().tobytes())

    def put_back(found: dict[str, Any]) -> Any:
        return tensors[found[_TENSOR]] if found.keys() == {_TENSOR} else found

    return json.loads(tensors[_TEXT].numpy().tobytes(), object_hook=put_back)
