"""How well the fusion model finds chosen images and captions of a set to match, shared over ranks.

Images are decoded again, each once, and captions are forwarded where they are needed: tokens of a
whole set would not fit in memory. Every rank makes the same number of calls, which ZeRO-3 needs.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mmscale.contracts import InputSpec, Peers
from mmscale.data.features import FeatureTable, SampleBatch, SampleBatches
from mmscale.data.lanes import sections
from mmscale.data.shards import ShardSet
from mmscale.data.stream import pad
from mmscale.engine.encode import Call
from mmscale.engine.inference import images_on
from mmscale.parallel.peers import from_all


def match_scores(
    call: Call,
    device: torch.device,
    shards: ShardSet,
    spec: InputSpec,
    peers: Peers,
    table: FeatureTable,
    wanted: Int64[Tensor, "pairs 2"],
    batch_size: int,
    workers: int,
) -> Float[Tensor, " pairs"]:
    """Log-odds of a match for each pair, equal on every rank. Collective.

    Args:
        call: Forward of a model with fusion, in evaluation mode.
        device: Where it computes.
        shards: The set.
        spec: What the towers are fed.
        peers: The ranks that share the work.
        table: The set's features, for its captions and which samples are sound.
        wanted: Row of the image and row of the caption among those of sound samples.
        batch_size: Images decoded, and pairs judged, at once.
        workers: Decoding processes.
    """
    places = table.good.nonzero()[:, 0][wanted[:, 0]]
    sound = table.good.repeat_interleave(table.first.diff()).nonzero()[:, 0]
    captions = [table.captions[row] for row in sound.tolist()]
    mine = sections(shards.samples, peers.size)
    slices = [_slices(places, part, batch_size, shards.samples) for part in mine]
    batches = SampleBatches(shards, spec, mine[peers.rank], batch_size)
    loader = batches.loader(workers)
    found: list[tuple[Tensor, Tensor]] = []
    for index in range(max(len(part) for part in slices)):
        batch = next(loader) if index < len(batches) else SampleBatch(None)
        tokens = _image_tokens(call, device, batch, spec)
        own = slices[peers.rank][index] if index < len(slices[peers.rank]) else []
        most = max(len(part[index]) for part in slices if index < len(part))
        for step in range(most):
            pairs = own[step] if step < len(own) else wanted.new_zeros(0)
            row = {place: row for row, place in enumerate(batch.places)}
            images = torch.tensor([row[place] for place in places[pairs].tolist()] or [0])
            texts = [captions[c] for c in wanted[pairs, 1].tolist()] or [captions[0]]
            found.append((pairs, _judge(call, device, spec, tokens, images, texts)[: len(pairs)]))
    scores = torch.zeros(len(wanted))
    for parts in from_all(peers, found):
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
def _image_tokens(call: Call, device: torch.device, batch: SampleBatch, spec: InputSpec) -> Tensor:
    if batch.pixels is None:
        pixels = torch.zeros(1, 3, spec.image_size, spec.image_size, device=device)
    else:
        pixels = images_on(batch.pixels, device, spec)
    return call("image_sequence", pixels)[1]


@torch.no_grad()
def _judge(
    call: Call,
    device: torch.device,
    spec: InputSpec,
    image_tokens: Tensor,
    images: Tensor,
    texts: list[str],
) -> Float[Tensor, " pairs"]:
    distinct = list(dict.fromkeys(texts))
    tokens, mask = pad(spec.tokenize(distinct), spec.pad_token)
    tokens, mask = tokens.to(device), mask.to(device)
    place = {text: row for row, text in enumerate(distinct)}
    rows = torch.tensor([place[text] for text in texts], device=device)
    _, text_tokens = call("text_sequence", tokens, mask)
    logits, _ = call("fuse", image_tokens, text_tokens, mask, images.to(device), rows, None)
    return (logits[:, 1] - logits[:, 0]).float().cpu()
