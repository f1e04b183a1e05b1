"""A batch larger than memory, with every negative: forward in chunks, twice.

The cut is after the towers: heads, fusion and loss run once over all of a rank's rows. Both passes
over a chunk draw the same random numbers, so dropout masks agree. Where fusion takes part, the
tokens of all of a rank's rows, and their gradient, are held besides the pooled features.

Source: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"
    (arXiv 2101.06983), section 3.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from mmscale.contracts import Batch, Features, LossInput, LossOutput
from mmscale.engine.protocol import Engine
from mmscale.parallel.device import rng_state, set_rng_state
from mmscale.parallel.phases import phase

TOWERS = {"image": "vision", "text": "text"}


@dataclass(frozen=True)
class StepOutput:
    """What comes after the towers, for all of a rank's rows.

    Attributes:
        rows: What the objective saw.
        loss: What it made of them.
    """

    rows: LossInput
    loss: LossOutput


@dataclass(frozen=True)
class _Chunk:
    rows: slice
    random: dict[str, Tensor]


def forward_backward(
    engine: Engine,
    batch: Batch,
    micro_rows: int,
    sequences: bool,
    compute_loss: Callable[[Features], StepOutput],
) -> StepOutput:
    """One update's gradients: those of the whole batch's loss.

    Args:
        engine: After `begin_update`.
        batch: This rank's rows, on the engine's device.
        micro_rows: Rows that fit in memory at once.
        sequences: `compute_loss` wants both towers' tokens too.
        compute_loss: From the features of all rows to embeddings and loss, with a graph.
    """
    chunks, features = _encode(engine, batch, micro_rows, sequences)
    # A tower whose output has no gradient to receive is frozen: nothing to replay.
    trained = [
        modality
        for modality, tower in TOWERS.items()
        if any(p.requires_grad for p in engine.module.get_submodule(tower).parameters())
    ]
    for name, leaf in _named(features).items():
        leaf.requires_grad_(name.split("_")[0] in trained)
    output = compute_loss(features)
    with phase("backward"):
        engine.backward(output.loss.total, last=not trained)
    if trained:
        gradients = {name: leaf.grad for name, leaf in _named(features).items()}
        _replay(engine, batch, chunks, gradients, trained)
    return output


def encode_rows(engine: Engine, batch: Batch, rows: slice, sequences: bool) -> Features:
    """Some of the batch's rows through both towers."""
    parts: dict[str, Tensor] = {}
    for modality in TOWERS:
        parts |= _tower(engine, batch, rows, modality, sequences)
    return Features(**parts)


def _tower(
    engine: Engine, batch: Batch, rows: slice, modality: str, sequences: bool
) -> dict[str, Tensor]:
    assert batch.mask is not None, "towers see undecoded rows, never cached features"
    inputs = (batch.image[rows],) if modality == "image" else (batch.tokens[rows], batch.mask[rows])
    with phase("forward"):
        if not sequences:
            return {modality: engine.call(modality, *inputs)}
        pooled, sequence = engine.call(f"{modality}_sequence", *inputs)
    return {modality: pooled, f"{modality}_sequence": sequence}


def _encode(
    engine: Engine, batch: Batch, micro_rows: int, sequences: bool
) -> tuple[list[_Chunk], Features]:
    """First pass: features without a graph, and the random state that each chunk started from."""
    chunks, parts = [], []
    with torch.no_grad():
        for start in range(0, len(batch), micro_rows):
            chunk = _Chunk(slice(start, start + micro_rows), rng_state(engine.device))
            parts.append(_named(encode_rows(engine, batch, chunk.rows, sequences)))
            chunks.append(chunk)
    return chunks, Features(
        **{name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    )


def _replay(
    engine: Engine,
    batch: Batch,
    chunks: list[_Chunk],
    gradients: dict[str, Tensor | None],
    trained: list[str],
) -> None:
    """Second pass: each chunk again, with a graph, pulled by the gradient at its features."""
    after = rng_state(engine.device)
    sequences = "image_sequence" in gradients
    for chunk in chunks:
        set_rng_state(engine.device, chunk.random)
        surrogate = torch.zeros((), device=engine.device)
        # A frozen tower runs in evaluation mode and draws nothing, so leaving it out is safe.
        for modality in trained:
            for name, output in _tower(engine, batch, chunk.rows, modality, sequences).items():
                gradient = gradients[name]
                # An output that no term of the objective looked at pulls nothing.
                pull = 0.0 if gradient is None else gradient[chunk.rows]
                surrogate = surrogate + (output * pull).sum()
        with phase("backward"):
            engine.backward(surrogate, last=chunk is chunks[-1], scaled=True)
    set_rng_state(engine.device, after)


def _named(features: Features) -> dict[str, Tensor]:
    named = {field.name: getattr(features, field.name) for field in fields(features)}
    return {name: value for name, value in named.items() if value is not None}
