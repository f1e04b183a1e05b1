"""Every image and caption of a set through the towers, shared out over the ranks.

Works with any engine: each rank makes the same number of calls, which ZeRO-3 needs.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from mmscale.config.schema import Config
from mmscale.contracts import InputSpec, Peers
from mmscale.data.caption_text import unknown_words
from mmscale.data.features import EncodedBatch, FeatureTable, KeptParts, SampleBatch, SampleBatches
from mmscale.data.lanes import sections
from mmscale.data.shards import ShardSet
from mmscale.data.stream import pad
from mmscale.data.workers import worker_count
from mmscale.engine.feed import images_on
from mmscale.errors import DataError
from mmscale.parallel.peers import gather_objects, gather_rows
from mmscale.parallel.world import promised_world, rank_cores

Call = Callable[..., Any]


@dataclass(frozen=True)
class Encoder:
    """Towers that whole sets are taken through, and how.

    Attributes:
        call: `Engine.call`, in evaluation mode.
        device: Where the towers compute.
        spec: What the towers are fed.
        peers: The ranks that share the work.
        batch_size: Rows of one call.
        workers: Decoding processes.
        max_damaged: Share of undecodable samples that is tolerated.
    """

    call: Call
    device: torch.device
    spec: InputSpec
    peers: Peers
    batch_size: int
    workers: int = 0
    max_damaged: float = 0.0

    @classmethod
    def of(
        cls, config: Config, call: Call, device: torch.device, spec: InputSpec, peers: Peers
    ) -> "Encoder":
        """With a run's settings."""
        workers = worker_count(config.data.workers, device, rank_cores(promised_world()))
        rows, most_damaged = config.eval.batch_size, config.data.max_damaged
        return cls(call, device, spec, peers, rows, workers, most_damaged)


def encode(
    encoder: Encoder,
    shards: ShardSet,
    progress: Callable[[int, int], None] = lambda done, total: None,
    kept: KeptParts | None = None,
) -> FeatureTable:
    """Tower outputs of a whole set, equal on every rank. Collective.

    Args:
        encoder: The towers.
        shards: The set.
        progress: Told this rank's samples done and in all.
        kept: This rank's batches that an earlier pass, cut short, has left; takes those of this
            one. Not under ZeRO-3, where ranks make each call together.

    Raises:
        DataError: More samples than tolerated cannot be decoded.
        ConfigError: The tokenizer does not know most of the captions' words.
    """
    spec, peers, batch_size = encoder.spec, encoder.peers, encoder.batch_size
    mine = sections(shards.samples, peers.size)
    batches = SampleBatches(shards, spec, mine[peers.rank], batch_size)
    places, total = batches.ranges(), len(mine[peers.rank])
    found = kept.find(places) if kept else {}
    parts: list[EncodedBatch] = []
    loader = batches.loader(encoder.workers, skip=found)
    with kept.keeping() if kept else nullcontext():
        for index, calls in enumerate(_text_calls(shards, mine, batch_size)):
            if (part := found.get(index)) is None:
                batch = next(loader) if index < len(batches) else SampleBatch(None)
                image = encode_images(encoder, batch.pixels)
                text = _texts(encoder, batch, calls)
                part = EncodedBatch(replace(batch, pixels=None), image, text)
                if kept and index < len(batches):
                    kept.add(places[index], part)
            parts.append(part)
            progress(min((index + 1) * batch_size, total), total)
    unknown_words(spec, (row for part in parts for row in part.batch.tokens), peers)
    table = _gather(parts, shards, peers)
    if len(table.damaged) > encoder.max_damaged * shards.samples:
        raise DataError(
            f"{len(table.damaged)} of {shards.samples} samples cannot be decoded, more than "
            f"data.max_damaged={encoder.max_damaged} allows; the first: {table.damaged[0]}"
        )
    return table


def _text_calls(shards: ShardSet, mine: list[range], batch_size: int) -> list[int]:
    """Calls that the captions of each batch need on the rank that has most of them."""
    counts = [count for shard in shards.shards for count in shard.captions]
    edges = [0, *accumulate(counts)]
    batches = -(-max(map(len, mine)) // batch_size)
    calls = []
    for index in range(batches):
        most = 0
        for places in mine:
            part = places[index * batch_size : (index + 1) * batch_size]
            most = max(most, edges[part.stop] - edges[part.start] if len(part) else 0)
        calls.append(-(-most // batch_size))
    return calls


@torch.no_grad()
def encode_images(encoder: Encoder, pixels: Tensor | None) -> Tensor:
    """Image features of a batch's bytes, on the CPU; of None no rows, by a call all the same."""
    if pixels is None:
        size = encoder.spec.image_size
        empty = encoder.call("image", torch.zeros(1, 3, size, size, device=encoder.device))
        return empty[:0].float().cpu()
    rows = images_on(pixels, encoder.device, encoder.spec)
    return encoder.call("image", rows).float().cpu()


@torch.no_grad()
def _texts(encoder: Encoder, batch: SampleBatch, calls: int) -> Tensor:
    device, pad_token, size = encoder.device, encoder.spec.pad_token, encoder.batch_size
    # Captions of like length together: less padding.
    order = sorted(range(len(batch.tokens)), key=lambda row: len(batch.tokens[row]))
    outputs = []
    for index in range(calls):
        rows = order[index * size : (index + 1) * size]
        tokens, mask = pad([batch.tokens[r] for r in rows] or [[pad_token]], pad_token)
        output = encoder.call(
            "text", tokens.to(device), mask.to(device) if rows else ~mask.to(device)
        )
        outputs.append(output[: len(rows)].float().cpu())
    gathered = torch.cat(outputs)
    restored = torch.empty_like(gathered)
    restored[torch.tensor(order, dtype=torch.long)] = gathered
    return restored


def _gather(parts: list[EncodedBatch], shards: ShardSet, peers: Peers) -> FeatureTable:
    batches = [part.batch for part in parts]
    image = torch.cat([part.image for part in parts])
    text = torch.cat([part.text for part in parts])
    words = {
        "places": [place for batch in batches for place in batch.places],
        "ids": [i for batch in batches for i in batch.image_ids],
        "keys": [key for batch in batches for key in batch.keys],
        "captions": [captions for batch in batches for captions in batch.captions],
        "damaged": [line for batch in batches for line in batch.damaged],
        "cut": [cut for batch in batches for cut in batch.cut],
    }
    everyone = gather_objects(peers, words)
    # Ranks hold neighbouring samples in order, so their rows and captions lie end to end.
    rows, texts_of_all = gather_rows(peers, image), gather_rows(peers, text)
    count = shards.samples
    images = image.new_zeros(count, image.shape[1])
    ids, good = torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.bool)
    keys = [""] * count
    captions: list[tuple[str, ...]] = [()] * count
    begin = 0
    for part in everyone:
        places = torch.tensor(part["places"], dtype=torch.long)
        images[places], begin = rows[begin : begin + len(places)], begin + len(places)
        ids[places] = torch.tensor(part["ids"], dtype=torch.long)
        good[places] = True
        for place, key, texts in zip(part["places"], part["keys"], part["captions"], strict=True):
            keys[place], captions[place] = key, tuple(texts)
    first = torch.tensor([0, *accumulate(map(len, captions))])
    return FeatureTable(
        image=images,
        text=texts_of_all,
        first=first,
        image_ids=ids,
        good=good,
        cut=torch.tensor([cut for part in everyone for cut in part["cut"]], dtype=torch.bool),
        keys=keys,
        captions=[caption for texts in captions for caption in texts],
        damaged=[line for part in everyone for line in part["damaged"]],
    )
