"""A model's recall on held-out pairs, while it trains and afterwards."""

from collections.abc import Callable
from statistics import fmean

import torch
from torch import Tensor

from mmscale.config.rules import matryoshka_widths
from mmscale.config.schema import Config
from mmscale.contracts import Peers
from mmscale.data.features import FeatureTable
from mmscale.data.shards import ShardSet
from mmscale.diagnostics.pairs import Pairs, Sources
from mmscale.diagnostics.retrieval import RECALLS, recalls, reranked_recalls, shortlists
from mmscale.engine.encode import Call, Encoder, encode
from mmscale.engine.rerank import match_scores
from mmscale.errors import HaltError
from mmscale.evaluation.encoded import HeldOut
from mmscale.evaluation.trained import Loaded


def embed_set(trained: Loaded, shards: ShardSet, peers: Peers) -> Pairs:
    """A set through a model."""
    call, device = trained.inference.call, trained.inference.device
    encoder = Encoder.of(trained.config, call, device, trained.spec, peers)
    return embed(call, device, encode(encoder, shards))


def evaluate_set(trained: Loaded, shards: ShardSet, peers: Peers) -> dict[str, float]:
    """What `evaluate` finds, of a model on a set."""
    call, device = trained.inference.call, trained.inference.device
    encoder = Encoder.of(trained.config, call, device, trained.spec, peers)
    table = encode(encoder, shards)
    return _figures(trained.config, encoder, shards, table, embed(call, device, table))


def evaluate(
    config: Config,
    call: Call,
    device: torch.device,
    held_out: HeldOut,
    peers: Peers,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, float], Pairs]:
    """Recall on held-out pairs with their mean, and the pairs' embeddings. Collective.

    Args:
        config: The run.
        call: Forward of a model in evaluation mode.
        device: Where it computes.
        held_out: The pairs.
        peers: All ranks.
        progress: Called as images are encoded, with how many and of how many.

    Raises:
        HaltError: The embeddings are not finite.
    """
    encoder = Encoder.of(config, call, device, held_out.spec, peers)
    table = held_out.table
    if table is None:
        table = encode(encoder, held_out.shards, progress)
    pairs = embed(call, device, table)
    require_sound_model(pairs, cached=held_out.table is not None)
    figures = _figures(config, encoder, held_out.shards, table, pairs)
    return figures | {"mean": fmean(figures[name] for name in RECALLS)}, pairs


def require_sound_model(pairs: Pairs, cached: bool) -> None:
    """Refuse what a model in training gives once its weights, or its activations, are broken.

    Args:
        pairs: What it gives.
        cached: The towers' outputs come from a cache: what is not finite there is the data's fault,
            and told where the pairs are compared.

    Raises:
        HaltError: The embeddings are not finite.
    """
    given = (pairs.backbone_image, pairs.backbone_text) if cached else ()
    if _are_finite(pairs.image, pairs.text) or not _are_finite(*given):
        return
    raise HaltError(
        "the model's embeddings of the held-out pairs are not finite: its weights have overflowed, "
        "or what it computes from them in this precision; go on from the checkpoint before with a "
        "lower optim.lr or optim.clip_norm"
    )


def _are_finite(*rows: Tensor | None) -> bool:
    return all(side is None or bool(side.isfinite().all()) for side in rows)


def embed(call: Call, device: torch.device, table: FeatureTable) -> Pairs:
    """Tower outputs through the heads: the pairs that are evaluated. Collective under ZeRO-3."""
    good, captions = table.good, table.good.repeat_interleave(table.first.diff())
    places = good.nonzero()[:, 0]
    sources = Sources(
        places,
        [table.keys[place] for place in places.tolist()],
        [table.captions[row] for row in captions.nonzero()[:, 0].tolist()],
    )
    with torch.no_grad():
        image, text, scale, _ = call(
            "heads", table.image[good].to(device), table.text[captions].to(device)
        )
    return Pairs(
        image=image.unit.float().cpu(),
        text=text.unit.float().cpu(),
        image_ids=table.image_ids[good],
        text_ids=table.text_ids()[captions],
        backbone_image=table.image[good],
        backbone_text=table.text[captions],
        logit_scale=float(scale),
        sources=sources,
    )


def _figures(
    config: Config, encoder: Encoder, shards: ShardSet, table: FeatureTable, pairs: Pairs
) -> dict[str, float]:
    """Recall of the dual encoder, at each width, and after re-ranking by fusion. Collective."""
    figures: dict[str, float] = dict(recalls(pairs, encoder.peers))
    for width in matryoshka_widths(config):
        at_width = recalls(pairs.cut(width), encoder.peers)
        figures |= {f"{name}@{width}": at_width[name] for name in RECALLS}
    if config.eval.rerank:
        lists = shortlists(pairs, config.eval.rerank)
        scores = match_scores(encoder, shards, table, lists.wanted())
        figures |= reranked_recalls(pairs, lists, scores)
    return figures
