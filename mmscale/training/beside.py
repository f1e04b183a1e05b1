"""Rows that pass the model beside a batch: joined before the towers, parted behind the heads.

They go the whole way of the batch, so that chunks, ranks and engines need not know of them.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmscale.contracts import Batch, Embeddings, Features, LossInput


def joined(batch: Batch, beside: Mapping[str, Batch]) -> Batch:
    """What the towers see: the batch's rows, then the others; only for the towers.

    Args:
        batch: This rank's rows, with pixels, or what frozen towers made of them.
        beside: Further rows of the same kind, by name.
    """
    if not beside:
        return batch
    every = [batch, *beside.values()]
    longest = max(one.tokens.shape[1] for one in every)

    def wide(rows: Tensor) -> Tensor:
        # Features of a cache are as wide as their tower, tokens as long as the longest caption.
        return pad(rows, (0, longest - rows.shape[1]))

    masks = [wide(one.mask) for one in every if one.mask is not None]
    assert len(masks) in (0, len(every)), "the batch and the others are of one kind"
    return replace(
        batch,
        image=torch.cat([one.image for one in every]),
        # What is padded the mask leaves out, whatever its id.
        tokens=torch.cat([wide(one.tokens) for one in every]),
        mask=torch.cat(masks) if masks else None,
        image_ids=torch.cat([one.image_ids for one in every]),
        match_ids=torch.cat([one.match_ids for one in every]),
        labels=torch.cat([one.labels for one in every]),
        keys=[key for one in every for key in one.keys],
        teacher_tokens={},
    )


def parted(
    rows: LossInput, features: Features, batch: Batch, beside: Mapping[str, Batch]
) -> tuple[LossInput, Features]:
    """The batch's own rows, which have the others in `LossInput.beside`; and its own features.

    Args:
        rows: Of what `joined` gave.
        features: Likewise.
        batch: This rank's rows.
        beside: As `joined` got them.
    """
    found: dict[str, LossInput] = {}
    first = len(batch)
    for name, more in beside.items():
        place = slice(first, first + len(more))
        found[name] = replace(
            rows,
            image=_cut(rows.image, place),
            text=_cut(rows.text, place),
            ids=more.match_ids,
            labels=None,
        )
        first += len(more)
    own = slice(0, len(batch))
    alone = replace(
        rows,
        image=_cut(rows.image, own),
        text=_cut(rows.text, own),
        ids=batch.match_ids,
        labels=batch.labels,
        beside=found,
    )
    images, texts = features.image_sequence, features.text_sequence
    return alone, Features(
        features.image[own],
        features.text[own],
        None if images is None else images[own],
        None if texts is None else texts[own, : batch.tokens.shape[1]],
    )


def _cut(rows: Embeddings, place: slice) -> Embeddings:
    return Embeddings(rows.raw[place], rows.projected[place], rows.unit[place])
