"""Some held-out pairs, the same at every probe: what a run is judged by while it trains."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from mmscale.contracts import InputSpec
from mmscale.data.features import SampleBatches
from mmscale.data.stream import pad
from mmscale.diagnostics.pairs import Pairs
from mmscale.engine.compiled import evaluating
from mmscale.engine.feed import images_on
from mmscale.errors import DataError
from mmscale.evaluation.encoded import HeldOut
from mmscale.evaluation.retrieval import require_sound_model
from mmscale.training.step import Learner


@dataclass(frozen=True)
class _Rows:
    """This rank's rows: what the towers are fed, or their cached outputs where there is no mask."""

    image: UInt8[Tensor, "b c h w"] | Float[Tensor, "b f"]
    text: Int64[Tensor, "b t"] | Float[Tensor, "b g"]
    mask: Bool[Tensor, "b t"] | None
    ids: Int64[Tensor, " b"]


class HeldOutSample:
    """Images spread evenly over a held-out set, each with its first caption; a share a rank.

    Decoded once and kept as bytes. Every rank holds as many rows.
    """

    def __init__(self, learner: Learner, spec: InputSpec, held_out: HeldOut, pairs: int):
        """Choose and decode.

        Args:
            learner: The model and its ranks.
            spec: What the model is fed.
            held_out: The held-out set.
            pairs: How many, over all ranks.

        Raises:
            DataError: None of this rank's samples can be decoded.
        """
        self._learner, self._spec = learner, spec
        size, rank = learner.peers.size, learner.peers.rank
        count = max(1, min(pairs, held_out.shards.samples) // size)
        step = max(1, held_out.shards.samples // (count * size))
        places = range(rank * count * step, (rank + 1) * count * step, step)
        take = _from_table if held_out.table is not None else _from_shards
        self._rows = _filled(take(held_out, places), count)

    def embedded(self) -> Pairs:
        """The rows of all ranks through the model as it is now. Collective."""
        rows, engine, peers = self._rows, self._learner.engine, self._learner.peers
        with evaluating(engine.module), torch.no_grad():
            image, text = _features(rows, self._learner, self._spec)
            embedded = engine.call("heads", image, text)
        ids = peers.columns(rows.ids.to(engine.device))
        pairs = Pairs(
            image=peers.columns(embedded[0].unit.float()).cpu(),
            text=peers.columns(embedded[1].unit.float()).cpu(),
            image_ids=ids.cpu(),
            text_ids=ids.cpu(),
            backbone_image=peers.columns(image.float()).cpu(),
            backbone_text=peers.columns(text.float()).cpu(),
            logit_scale=float(embedded[2]),
        )
        require_sound_model(pairs, cached=rows.mask is None)
        return pairs


def _features(rows: _Rows, learner: Learner, spec: InputSpec) -> tuple[Tensor, Tensor]:
    """Tower outputs, in chunks that fit in memory."""
    engine, micro = learner.engine, learner.micro_rows
    if rows.mask is None:
        return rows.image.to(engine.device), rows.text.to(engine.device)
    images, texts = [], []
    for start in range(0, len(rows.ids), micro):
        part = slice(start, start + micro)
        images.append(engine.call("image", images_on(rows.image[part], engine.device, spec)))
        inputs = rows.text[part].to(engine.device), rows.mask[part].to(engine.device)
        texts.append(engine.call("text", *inputs))
    return torch.cat(images), torch.cat(texts)


def _from_table(held_out: HeldOut, places: range) -> _Rows:
    table = held_out.table
    assert table is not None, "it was looked at"
    chosen = torch.tensor([place for place in places if table.good[place]], dtype=torch.long)
    return _Rows(
        table.image[chosen], table.text[table.first[chosen]], None, table.image_ids[chosen]
    )


def _from_shards(held_out: HeldOut, places: range) -> _Rows:
    spec: InputSpec = held_out.spec
    batch = SampleBatches(held_out.shards, spec, places, len(places))[0]
    if batch.pixels is None:
        raise DataError(
            f"none of {len(places)} held-out samples can be decoded, the first: "
            f"{batch.damaged[0]}; run mmscale verify on data.eval"
        )
    firsts = [0, *accumulate(len(captions) for captions in batch.captions)][:-1]
    text, mask = pad([batch.tokens[first] for first in firsts], spec.pad_token)
    return _Rows(batch.pixels, text, mask, torch.tensor(batch.image_ids))


def _filled(rows: _Rows, count: int) -> _Rows:
    """As many rows as on every rank: the last is repeated where samples were damaged."""
    if not len(rows.ids):
        raise DataError("none of this rank's held-out samples can be used; run mmscale verify")
    index = torch.arange(count).clamp(max=len(rows.ids) - 1)
    take: Callable[[Tensor], Tensor] = lambda values: values[index]  # noqa: E731
    return _Rows(
        take(rows.image),
        take(rows.text),
        None if rows.mask is None else take(rows.mask),
        take(rows.ids),
    )
