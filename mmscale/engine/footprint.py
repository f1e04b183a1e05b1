"""What a model keeps and computes, read from one row or a forward over tensors without values."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from mmscale.config.schema import Config
from mmscale.config.training import OptimConfig
from mmscale.contracts import InputSpec
from mmscale.engine.optimizer import parameter_groups
from mmscale.engine.plan import BatchPlan, held_rows
from mmscale.engine.zero_settings import LOWER_PRECISION_SAFE
from mmscale.model.blocks import model_blocks
from mmscale.model.two_tower import TwoTower

# torch 2.11 counts attention's kernel for GPUs only, which has the same products.
_FLASH, _CPU = "_scaled_dot_product_flash_attention", "_for_cpu"
for _pass in ("", "_backward"):
    flop_registry.setdefault(
        getattr(torch.ops.aten, _FLASH + _CPU + _pass),
        flop_registry[getattr(torch.ops.aten, _FLASH + _pass)],
    )
SHORT = 8  # tokens of the shorter caption that FLOPs are counted on


@dataclass(frozen=True)
class Weight:
    """A parameter.

    Attributes:
        name: Its name in the model.
        numel: Elements.
        group: Its optimizer group; None where it is frozen.
        sent_low: Belongs to a layer whose weights DeepSpeed sends in autocast's dtype.
        block: Number of the transformer block that it is part of; None outside of them.
    """

    name: str
    numel: int
    group: str | None
    sent_low: bool
    block: int | None = None


@dataclass(frozen=True)
class Work:
    """One part of the model over some rows.

    Attributes:
        saved: Bytes that its forward keeps for the backward; inputs and weights not counted.
        output: Bytes of what it gives.
        forward: FLOPs of the forward.
        both: FLOPs of forward and backward; of a frozen part, of the forward.
    """

    saved: int
    output: int
    forward: int
    both: int


@dataclass(frozen=True)
class Footprint:
    """A model at a size of chunk.

    Attributes:
        weights: Every parameter.
        buffers: Bytes of buffers.
        towers: `image` and `text` over a chunk's rows.
        heads: Heads over all rows that pass them on a rank.
        rows: Rows of a chunk.
        passed: Rows of a rank: its own of the batch, and those that anchors hold beside them.
        tokens: Tokens of a caption.
        embed_dim: Shared width.
    """

    weights: tuple[Weight, ...]
    buffers: int
    towers: dict[str, Work]
    heads: Work
    rows: int
    passed: int
    tokens: int
    embed_dim: int

    @property
    def chunks(self) -> int:
        """Forwards that a rank needs for its rows."""
        return -(-self.passed // self.rows)

    def numel(self, trained: bool) -> int:
        """Elements of all trained, or of all frozen parameters."""
        return sum(w.numel for w in self.weights if (w.group is not None) is trained)


def footprint(
    model: TwoTower,
    spec: InputSpec,
    config: Config,
    plan: BatchPlan,
    tokens: int,
    dtype: torch.dtype,
) -> Footprint:
    """Read a model, on any device; afterwards it cannot compute any more.

    Args:
        model: Whole.
        spec: Its input.
        config: The run.
        plan: Its batch.
        tokens: Tokens of a caption.
        dtype: Of matrix products.
    """
    weights = tuple(_weights(model, config.optim))
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    passed = plan.rank_rows + sum(held_rows(config, plan.world).values())
    rows = plan.micro_rows if plan.chunks > 1 else passed
    with FakeTensorMode(allow_non_fake_inputs=True):
        _forget_values(model)
        model.train()
        pixels = torch.empty(rows, 3, spec.image_size, spec.image_size)
        ids = torch.ones(rows, tokens, dtype=torch.int64)
        towers = {
            "image": _work(model, dtype, "image", pixels),
            "text": _work(model, dtype, "text", ids, ids.bool()),
        }
        features = (
            torch.empty(passed, tower.width, requires_grad=part not in model.frozen)
            for part, tower in (("vision", model.vision), ("text", model.text))
        )
        heads = _work(model, dtype, "heads", *features)
    width = config.model.embed_dim
    return Footprint(weights, buffers, towers, heads, rows, passed, tokens, width)


def _weights(model: nn.Module, optim: OptimConfig) -> Iterator[Weight]:
    groups = {
        id(parameter): group["name"]
        for group in parameter_groups(model, optim)
        for parameter in group["params"]
    }
    low = {
        id(parameter)
        for module in model.modules()
        # As DeepSpeed compares: a subclass is another class.
        if type(module) in LOWER_PRECISION_SAFE
        for parameter in module.parameters(recurse=False)
    }
    block_of = {
        id(parameter): number
        for number, block in enumerate(model_blocks(model))
        for parameter in block.parameters()
    }
    for name, parameter in model.named_parameters():
        key = id(parameter)
        yield Weight(name, parameter.numel(), groups.get(key), key in low, block_of.get(key))


def _forget_values(model: nn.Module) -> None:
    """Put tensors of shape and dtype alone in place of every parameter and buffer."""
    known: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in known:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                known[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
            module._parameters[name] = known[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _work(model: nn.Module, dtype: torch.dtype, mode: str, *inputs: Tensor) -> Work:
    kept = Remembered([*model.parameters(), *model.buffers(), *inputs])
    with counting() as counter:
        with (
            saved_tensors_hooks(kept.pack, kept.unpack),
            torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
        ):
            outputs = _tensors(model(mode, *inputs))
        forward, saved = counter.get_total_flops(), kept.bytes
        total = sum((x.float().sum() for x in outputs if x.requires_grad), torch.zeros(()))
        if total.requires_grad:
            total.backward()
        both = counter.get_total_flops()
    for parameter in model.parameters():
        parameter.grad = None
    return Work(saved, sum(x.nbytes for x in outputs), forward, both)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value if isinstance(value, tuple) else vars(value).values() if value else ()
    return [tensor for part in parts for tensor in _tensors(part)]


class Remembered:
    """Hooks of `saved_tensors_hooks` that count each storage once, whatever looks at it."""

    def __init__(self, others: list[Tensor]):
        """Begin to count.

        Args:
            others: Tensors that live anyway: weights and inputs.
        """
        self._others = {tensor.untyped_storage()._cdata for tensor in others}
        self._held: dict[int, Any] = {}
        self.unpack: Callable[[Tensor], Tensor] = lambda tensor: tensor

    @property
    def bytes(self) -> int:
        """So far."""
        return sum(storage.nbytes() for storage in self._held.values())

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._others:
            self._held[storage._cdata] = storage
        return tensor


@dataclass(frozen=True)
class Flops:
    """Forward and backward of one row through the towers; a frozen tower goes forward only.

    Recomputation does not count.

    Attributes:
        image: Of an image.
        token: Of a caption, what grows with its tokens.
        token_pair: Of a caption, what grows with their square.
    """

    image: float
    token: float
    token_pair: float

    def update(self, rows: int, tokens: int) -> float:
        """Of an update over so many pairs, captions padded to `tokens`."""
        return rows * (self.image + self.token * tokens + self.token_pair * tokens**2)


def count_flops(model: TwoTower, spec: InputSpec) -> Flops:
    """Send one row through both towers, forward and back; draws random numbers if they do.

    Args:
        model: Whole, before an engine takes it.
        spec: Its input.
    """
    device = next(model.parameters()).device
    size, longest = spec.image_size, spec.context_length
    short = min(SHORT, longest // 2) or longest
    image = _both(model, "image", torch.zeros(1, 3, size, size, device=device))
    few, many = (_caption(model, count, device) for count in (short, longest))
    # Attention's products grow with the square, all others with the tokens.
    pairs = (many / longest - few / short) / (longest - short) if longest > short else 0.0
    return Flops(image, many / longest - pairs * longest, pairs)


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Count every product within; torch's shortcut for attention in evaluation hides its own."""
    shortcut = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(shortcut)


def _caption(model: TwoTower, tokens: int, device: torch.device) -> int:
    ids = torch.ones(1, tokens, dtype=torch.int64, device=device)
    return _both(model, "text", ids, ids.bool())


def _both(model: TwoTower, mode: str, *inputs: Tensor) -> int:
    with counting() as counter:
        output: Any = model(mode, *inputs)
        trained = [p for p in model.parameters() if p.requires_grad]
        if output.requires_grad:
            torch.autograd.grad(output.float().sum(), trained, allow_unused=True)
    return counter.get_total_flops()
