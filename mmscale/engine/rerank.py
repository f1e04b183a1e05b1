"""How well the fusion model finds chosen images and captions of a set to match, shared over ranks.

Images are decoded again, each once, and captions are forwarded where they are needed: tokens of a
whole set would not fit in memory. Every rank makes the same number of calls, which ZeRO-3 needs.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mmscale.data.features import FeatureTable, SampleBatch, SampleBatches
from mmscale.data.lanes import sections
from mmscale.data.shards import ShardSet
from mmscale.data.stream import pad
from mmscale.engine.encode import Encoder
from mmscale.engine.feed import images_on
from mmscale.parallel.peers import gather_objects


def match_scores(
    encoder: Encoder, shards: ShardSet, table: FeatureTable, wanted: Int64[Tensor, "pairs 2"]
) -> Float[Tensor, " pairs"]:
    """Log-odds of a match for each pair, equal on every rank. Collective.

    Args:
        encoder: A model with fusion; takes as many images, and judges as many pairs, at once as its
            batches have rows.
        shards: The set.
        table: The set's features, for its captions and which samples are sound.
        wanted: Row of the image and row of the caption among those of sound samples.
    """
    peers, batch_size = encoder.peers, encoder.batch_size
    places = table.good.nonzero()[:, 0][wanted[:, 0]]
    sound = table.good.repeat_interleave(table.first.diff()).nonzero()[:, 0]
    captions = [table.captions[row] for row in sound.tolist()]
    mine = sections(shards.samples, peers.size)
    slices = [_slices(places, part, batch_size, shards.samples) for part in mine]
    batches = SampleBatches(shards, encoder.spec, mine[peers.rank], batch_size)
    loader = batches.loader(encoder.workers)
    found: list[tuple[Tensor, Tensor]] = []
    for index in range(max(len(part) for part in slices)):
        batch = next(loader) if index < len(batches) else SampleBatch(None)
        tokens = _image_tokens(encoder, batch)
        own = slices[peers.rank][index] if index < len(slices[peers.rank]) else []
        most = max(len(part[index]) for part in slices if index < len(part))
        for step in range(most):
            pairs = own[step] if step < len(own) else wanted.new_zeros(0)
            row = {place: row for row, place in enumerate(batch.places)}
            images = torch.tensor([row[place] for place in places[pairs].tolist()] or [0])
            texts = [captions[c] for c in wanted[pairs, 1].tolist()] or [captions[0]]
            found.append((pairs, _judge(encoder, tokens, images, texts)[: len(pairs)]))
    scores = torch.zeros(len(wanted))
    for parts in gather_objects(peers, found):
        for pairs, values in parts:
            scores[pairs] = values
    return scores


def _slices(places: Tensor, part: range, batch_size: int, samples: int) -> list[list[Tensor]]:
    """For each batch of a rank's images, its pairs cut into slices."""
    cut = []
    for start in range(part.start, part.stop, batch_size):
        stop = min(start + batch_size, part.stop)
        pairs = ((places >= start) & (places < stop)).nonzero()[:, 0]
        cut.append(list(pairs.split(batch_size)) if len(pairs) else [])
    return cut


@torch.no_grad()
def _image_tokens(encoder: Encoder, batch: SampleBatch) -> Tensor:
    device, spec = encoder.device, encoder.spec
    if batch.pixels is None:
        pixels = torch.zeros(1, 3, spec.image_size, spec.image_size, device=device)
    else:
        pixels = images_on(batch.pixels, device, spec)
    return encoder.call("image_sequence", pixels)[1]


@torch.no_grad()
def _judge(
    encoder: Encoder, image_tokens: Tensor, images: Tensor, texts: list[str]
) -> Float[Tensor, " pairs"]:
    device, spec = encoder.device, encoder.spec
    distinct = list(dict.fromkeys(texts))
    tokens, mask = pad(spec.tokenize(distinct), spec.pad_token)
    tokens, mask = tokens.to(device), mask.to(device)
    place = {text: row for row, text in enumerate(distinct)}
    rows = torch.tensor([place[text] for text in texts], device=device)
    _, text_tokens = encoder.call("text_sequence", tokens, mask)
    logits, _ = encoder.call("fuse", image_tokens, text_tokens, mask, images.to(device), rows, None)
    return (logits[:, 1] - logits[:, 0]).float().cpu()
