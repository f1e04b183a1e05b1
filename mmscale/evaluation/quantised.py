"""What int8 costs: quantised graphs beside those that they were made of, on held-out pairs."""

from typing import Any

import torch
from torch import Tensor

from mmscale.checkpoint.export import Call, Cost, Exported
from mmscale.config.schema import Config
from mmscale.contracts import InputSpec
from mmscale.data.shards import ShardSet
from mmscale.diagnostics.pairs import Pairs
from mmscale.diagnostics.retrieval import RECALLS, recalls
from mmscale.engine.encode import Encoder, encode
from mmscale.evaluation.retrieval import embed
from mmscale.parallel.peers import Alone

_CPU = torch.device("cpu")


def cost_on_pairs(config: Config, spec: InputSpec, shards: ShardSet) -> Cost:
    """Measures the greatest difference of an element of a unit row, and both models' recall.

    Args:
        config: Of the run.
        spec: What its model is fed.
        shards: Held-out pairs.
    """

    def embedded(call: Call) -> Pairs:
        encoder = Encoder.of(config, call, _CPU, spec, Alone())
        return embed(call, _CPU, encode(encoder, shards))

    def measure(whole: Call, int8: Call) -> dict[str, Any]:
        before, after = embedded(whole), embedded(int8)
        found = {"fp32": recalls(before, Alone()), "int8": recalls(after, Alone())}
        return {
            **_differences((before.image, before.text), (after.image, after.text)),
            "images": found["fp32"]["images"],
            "captions": found["fp32"]["captions"],
            "recall": {
                name: {kind: figures[name] for kind, figures in found.items()} for name in RECALLS
            },
        }

    return measure


def cost_on_sample(exported: Exported) -> Cost:
    """Measures the difference on two rows of noise and two captions, where no pairs are at hand."""
    pixels, tokens = exported.sample()
    mask = (tokens != exported.spec.pad_token).flip(1).cumsum(1).flip(1) > 0

    def measure(whole: Call, int8: Call) -> dict[str, Any]:
        before, after = (
            (call("image", pixels), call("text", tokens, mask)) for call in (whole, int8)
        )
        return {**_differences(before, after), "images": 0, "captions": 0, "recall": {}}

    return measure


def cost_lines(cost: dict[str, Any]) -> list[str]:
    """The figures of a `Cost` as they are told."""
    image, text = cost["image_difference"], cost["text_difference"]
    lines = [f"int8: unit rows differ by at most {image:.4f} (images) and {text:.4f} (captions)"]
    for name, by_kind in cost["recall"].items():
        before, after = by_kind["fp32"], by_kind["int8"]
        lines.append(f"{name:>7} {before:.2f} in fp32, {after:.2f} in int8, {after - before:+.2f}")
    return lines


def _differences(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> dict[str, float]:
    return {
        f"{side}_difference": float((left - right).abs().max())
        for side, left, right in zip(("image", "text"), before, after, strict=True)
    }
