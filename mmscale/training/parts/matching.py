"""Pairs for the fusion model: each row's own, and one hard negative each way.

Outside the guarantee of one global batch: negatives are mined among this rank's rows. They do not
depend on chunks, and each draw follows from the seed, the step and the row's key alone.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mmscale.contracts import Batch, Features, LossInput, Matched
from mmscale.training.part import Part


class Matching(Part):
    """Chooses pairs and lets the fusion model judge them.

    A row gives its own pair, its image with another caption and its caption with another image,
    drawn with the probability that softmax gives them: the more alike, the likelier. Rows with
    equal match ids are never paired as negatives; a row without any gives its own pair only.

    Source: Li et al. 2021 (arXiv 2107.07651), section 3.2.
    """

    name = "matching"
    reads_tokens = True

    def __init__(self, call: Callable[..., Any], seed: int, micro_rows: int, negatives: bool):
        """Fix what the pairs follow from.

        Args:
            call: Forward of a model that has a fusion.
            seed: `run.seed`.
            micro_rows: Rows forwarded at once; as many pairs are judged at once where that is less
                than all rows.
            negatives: Judge negatives too; classification alone has no use for them.
        """
        self._call = call
        self._seed = seed
        self._micro_rows = micro_rows
        self._negatives = negatives

    def inputs(self, rows: LossInput, features: Features, batch: Batch) -> LossInput:
        similarity = (rows.scale * rows.image.unit @ rows.text.unit.T).detach()
        matched = self.match(batch, features, similarity, rows.step)
        return replace(
            rows,
            matching=matched.logits,
            matching_targets=matched.targets,
            class_logits=matched.class_logits,
        )

    def match(
        self,
        batch: Batch,
        features: Features,
        similarity: Float[Tensor, "b b"],
        step: int,
    ) -> Matched:
        """Logits of this rank's pairs, with a graph to the towers' tokens. Collective under ZeRO-3.

        Args:
            batch: This rank's rows.
            features: Both towers' outputs for them, with tokens.
            similarity: Of each image with each caption, times the scale; without a graph.
            step: Updates taken so far.
        """
        images, texts, kept = self._pairs(batch, similarity, step)
        at_once = self._micro_rows if self._micro_rows < len(batch) else None
        matching, classes = self._call(
            "fuse",
            features.image_sequence,
            features.text_sequence,
            batch.mask,
            images,
            texts,
            at_once,
        )
        targets = (torch.arange(len(kept), device=kept.device) < len(batch)).long()
        return Matched(
            logits=matching[kept],
            targets=targets[kept],
            class_logits=None if classes is None else classes[: len(batch)],
        )

    def _pairs(
        self, batch: Batch, similarity: Float[Tensor, "b b"], step: int
    ) -> tuple[Int64[Tensor, " m"], Int64[Tensor, " m"], Bool[Tensor, " m"]]:
        """Image row and caption row of each pair, own pairs first, and which of them count."""
        rows = torch.arange(len(batch), device=similarity.device)
        if not self._negatives:
            return rows, rows, torch.ones_like(rows, dtype=torch.bool)
        negative = batch.match_ids[:, None] != batch.match_ids[None, :]
        draws = self._draws(batch.keys, step).to(similarity)
        other_text = hard_negatives(similarity, negative, draws[0])
        other_image = hard_negatives(similarity.T, negative, draws[1])
        # Rows without a negative are judged too, and dropped: ranks must do equal work.
        has = negative.any(1)
        return (
            torch.cat([rows, rows, other_image]),
            torch.cat([rows, other_text, rows]),
            torch.cat([torch.ones_like(has), has, has]),
        )

    def _draws(self, keys: Sequence[str], step: int) -> Float[Tensor, "2 b"]:
        """Two numbers in [0, 1) a row."""
        return torch.tensor(
            [
                [_uniform(f"{self._seed}/{step}/{way}/{key}") for key in keys]
                for way in ("text", "image")
            ],
            dtype=torch.float64,
        )


def hard_negatives(
    similarity: Float[Tensor, "b c"], negative: Bool[Tensor, "b c"], draws: Float[Tensor, " b"]
) -> Int64[Tensor, " b"]:
    """A column for each row, drawn by softmax over its negatives; the row's own without any.

    Args:
        similarity: Logits.
        negative: Which columns may be drawn.
        draws: A number in [0, 1) a row; it picks where the cumulated probabilities pass it.
    """
    logits = similarity.masked_fill(~negative, -torch.inf)
    cumulated = logits.softmax(1).nan_to_num(0.0).cumsum(1)
    total = cumulated[:, -1:]
    # Rounding must not reach beyond the last column that may be drawn, nor before the first.
    below = (cumulated <= draws[:, None].to(total) * total) & (cumulated < total)
    chosen = below.sum(1)
    return torch.where(negative.any(1), chosen, torch.arange(len(chosen), device=chosen.device))


def _uniform(words: str) -> float:
    digest = hashlib.blake2b(words.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
