"""A batch larger than memory, with every negative: forward in chunks, twice.

The cut is after the towers: heads and loss run once over all of a rank's rows. Both passes over a
chunk draw the same random numbers, so dropout masks agree.

Source: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"
    (arXiv 2101.06983), section 3.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmscale.contracts import Batch, Embeddings, Engine, LossOutput
from mmscale.dist.device import rng_state, set_rng_state

HeadsAndLoss = Callable[[Tensor, Tensor], tuple[Embeddings, Embeddings, LossOutput]]


@dataclass(frozen=True)
class _Chunk:
    rows: slice
    random: dict[str, Tensor]


def forward_backward(
    engine: Engine, batch: Batch, micro_rows: int, heads_and_loss: HeadsAndLoss
) -> tuple[Embeddings, Embeddings, LossOutput]:
    """One window: all gradients of the batch's loss.

    Args:
        engine: With its window open.
        batch: This rank's rows, on the engine's device.
        micro_rows: Rows that fit in memory at once.
        heads_and_loss: From raw features of all rows to embeddings and loss, with a graph.
    """
    chunks, image, text = _encode(engine, batch, micro_rows)
    # A tower whose output has no gradient to receive is frozen: nothing to replay.
    trained = [
        name
        for name in ("image", "text")
        if any(p.requires_grad for p in _tower(engine, name).parameters())
    ]
    image.requires_grad_("image" in trained)
    text.requires_grad_("text" in trained)
    embedded = heads_and_loss(image, text)
    engine.backward(embedded[2].total, last=not trained)
    if trained:
        _replay(engine, batch, chunks, {"image": image.grad, "text": text.grad}, trained)
    return embedded


def _tower(engine: Engine, name: str) -> torch.nn.Module:
    return engine.module.get_submodule({"image": "vision", "text": "text"}[name])


def _encode(engine: Engine, batch: Batch, micro_rows: int) -> tuple[list[_Chunk], Tensor, Tensor]:
    """First pass: features without a graph, and the random state that each chunk started from."""
    chunks, images, texts = [], [], []
    with torch.no_grad():
        for start in range(0, len(batch), micro_rows):
            chunk = _Chunk(slice(start, start + micro_rows), rng_state(engine.device))
            images.append(_image(engine, batch, chunk))
            texts.append(_text(engine, batch, chunk))
            chunks.append(chunk)
    return chunks, torch.cat(images), torch.cat(texts)


def _replay(
    engine: Engine,
    batch: Batch,
    chunks: list[_Chunk],
    gradients: dict[str, Tensor | None],
    trained: list[str],
) -> None:
    """Second pass: each chunk again, with a graph, pulled by the gradient at its features."""
    after = rng_state(engine.device)
    for chunk in chunks:
        set_rng_state(engine.device, chunk.random)
        surrogate = torch.zeros((), device=engine.device)
        # A frozen tower runs in evaluation mode and draws nothing, so leaving it out is safe.
        for name in trained:
            forward = _image if name == "image" else _text
            gradient = gradients[name]
            assert gradient is not None, f"the {name} features took part in the loss"
            surrogate = surrogate + (forward(engine, batch, chunk) * gradient[chunk.rows]).sum()
        engine.backward(surrogate, last=chunk is chunks[-1])
    set_rng_state(engine.device, after)


def _image(engine: Engine, batch: Batch, chunk: _Chunk) -> Tensor:
    return engine.call("image", batch.image[chunk.rows])


def _text(engine: Engine, batch: Batch, chunk: _Chunk) -> Tensor:
    assert batch.mask is not None, "chunks are cut from undecoded rows, never from cached features"
    return engine.call("text", batch.tokens[chunk.rows], batch.mask[chunk.rows])
