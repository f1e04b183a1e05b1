"""Every image and caption of a set through the towers, shared out over the ranks.

Works with any engine: each rank makes the same number of calls, which ZeRO-3 needs.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from mmscale.contracts import InputSpec, Peers
from mmscale.data.caption_text import unknown_words
from mmscale.data.features import EncodedBatch, FeatureTable, KeptParts, SampleBatch, SampleBatches
from mmscale.data.lanes import sections
from mmscale.data.shards import ShardSet
from mmscale.data.stream import pad
from mmscale.engine.inference import images_on
from mmscale.errors import DataError
from mmscale.parallel.peers import from_all

Call = Callable[..., Any]


def encode(
    call: Call,
    device: torch.device,
    shards: ShardSet,
    spec: InputSpec,
    peers: Peers,
    batch_size: int,
    workers: int,
    max_damaged: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
    kept: KeptParts | None = None,
) -> FeatureTable:
    """Tower outputs of a whole set, equal on every rank.

    Args:
        call: `Engine.call`, in evaluation mode.
        device: Where the towers compute.
        shards: The set.
        spec: What the towers are fed.
        peers: The ranks that share the work.
        batch_size: Rows of one call.
        workers: Decoding processes.
        max_damaged: Share of undecodable samples that is tolerated.
        progress: Told this rank's samples done and in all.
        kept: This rank's batches that an earlier pass, cut short, has left; takes those of this
            one. Not under ZeRO-3, where ranks make each call together.

    Raises:
        DataError: More samples than tolerated cannot be decoded.
        ConfigError: The tokenizer does not know most of the captions' words.
    """
    mine = sections(shards.samples, peers.size)
    batches = SampleBatches(shards, spec, mine[peers.rank], batch_size)
    places, total = batches.ranges(), len(mine[peers.rank])
    found = kept.find(places) if kept else {}
    parts: list[EncodedBatch] = []
    loader = batches.loader(workers, skip=found)
    with kept.keeping() if kept else nullcontext():
        for index, calls in enumerate(_text_calls(shards, mine, batch_size)):
            if (part := found.get(index)) is None:
                batch = next(loader) if index < len(batches) else SampleBatch(None)
                image = _images(call, device, batch, spec)
                text = _texts(call, device, batch, spec, calls, batch_size)
                part = EncodedBatch(replace(batch, pixels=None), image, text)
                if kept and index < len(batches):
                    kept.add(places[index], part)
            parts.append(part)
            progress(min((index + 1) * batch_size, total), total)
    unknown_words(spec, (row for part in parts for row in part.batch.tokens), peers)
    table = _gather(parts, shards, peers)
    if len(table.damaged) > max_damaged * shards.samples:
        raise DataError(
            f"{len(table.damaged)} of {shards.samples} samples cannot be decoded, more than "
            f"data.max_damaged={max_damaged} allows; the first: {table.damaged[0]}"
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
def _images(call: Call, device: torch.device, batch: SampleBatch, spec: InputSpec) -> Tensor:
    if batch.pixels is None:
        size = spec.image_size
        empty = call("image", torch.zeros(1, 3, size, size, device=device))
        return empty[:0].float().cpu()
    return call("image", images_on(batch.pixels, device, spec)).float().cpu()


@torch.no_grad()
def _texts(
    call: Call,
    device: torch.device,
    batch: SampleBatch,
    spec: InputSpec,
    calls: int,
    batch_size: int,
) -> Tensor:
    # Captions of like length together: less padding.
    order = sorted(range(len(batch.tokens)), key=lambda row: len(batch.tokens[row]))
    outputs = []
    for index in range(calls):
        rows = order[index * batch_size : (index + 1) * batch_size]
        tokens, mask = pad([batch.tokens[r] for r in rows] or [[spec.pad_token]], spec.pad_token)
        output = call("text", tokens.to(device), mask.to(device) if rows else ~mask.to(device))
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
    everyone = from_all(peers, {**words, "image": image, "text": text})
    count = shards.samples
    images = image.new_zeros(count, image.shape[1])
    ids, good = torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.bool)
    keys = [""] * count
    captions: list[tuple[str, ...]] = [()] * count
    for part in everyone:
        places = torch.tensor(part["places"], dtype=torch.long)
        images[places], ids[places] = part["image"], torch.tensor(part["ids"], dtype=torch.long)
        good[places] = True
        for place, key, texts in zip(part["places"], part["keys"], part["captions"], strict=True):
            keys[place], captions[place] = key, tuple(texts)
    first = torch.tensor([0, *accumulate(map(len, captions))])
    return FeatureTable(
        image=images,
        # Ranks hold neighbouring samples in order, so their captions lie end to end.
        text=torch.cat([part["text"] for part in everyone]),
        first=first,
        image_ids=ids,
        good=good,
        cut=torch.tensor([cut for part in everyone for cut in part["cut"]], dtype=torch.bool),
        keys=keys,
        captions=[caption for texts in captions for caption in texts],
        damaged=[line for part in everyone for line in part["damaged"]],
    )
