"""To two ONNX graphs, `image.onnx` (pixels) and `text.onnx` (tokens, mask), and their tokenizer.

In int8 matrices and kernels are kept in a byte a number, with their range, and what they are
multiplied by is rounded as it comes: onnxruntime's dynamic quantisation with its own defaults.
"""

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmscale.checkpoint.export import (
    Exported,
    preprocessing,
    require_equal,
    write_json,
    write_tokenizer,
)

GRAPHS = ("image", "text")
_WHOLE = ".whole"


@dataclass(frozen=True)
class Unit:
    """One side's unit rows, under the name that an engine's heads give them."""

    unit: Tensor


class Graphs:
    """Both graphs of a folder, called as an engine calls towers and heads."""

    def __init__(self, folder: Path, ending: str, logit_scale: float):
        import onnxruntime

        self._scale = logit_scale
        self._sessions = {
            name: onnxruntime.InferenceSession(
                folder / f"{name}{ending}", providers=["CPUExecutionProvider"]
            )
            for name in GRAPHS
        }

    def __call__(self, mode: str, *inputs: Tensor) -> Any:
        """Unit rows of `image` (pixels) or `text` (tokens, mask); `heads` hands both on."""
        if mode == "heads":
            image, text = inputs
            return Unit(image), Unit(text), self._scale, None
        session = self._sessions[mode]
        names = [each.name for each in session.get_inputs()]
        fed = {name: rows.numpy() for name, rows in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, fed)[0])


class _Image(nn.Module):
    def __init__(self, encoder: Any):
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Any) -> Any:
        return self.encoder.encode_image(pixels, True)


class _Text(nn.Module):
    def __init__(self, encoder: Any):
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens: Any, mask: Any) -> Any:
        return self.encoder.encode_text(tokens, mask, True)


def write_onnx(what: Exported, folder: Path) -> None:
    """Both graphs give unit rows; batch and caption length are free.

    Raises:
        ConfigError: onnxruntime computes something else.
    """
    pixels, tokens = what.sample()
    mask = (tokens != what.spec.pad_token).flip(1).cumsum(1).flip(1) > 0
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=_longest(what))
    _write(_Image(what.encoder), (pixels,), {"pixels": {0: batch}}, folder / "image.onnx")
    shapes = {"tokens": {0: batch, 1: length}, "mask": {0: batch, 1: length}}
    _write(_Text(what.encoder), (tokens, mask), shapes, folder / "text.onnx")
    scale = what.encoder.logit_scale()
    graphs = Graphs(folder, ".onnx", scale)
    for rows in (1, 2):
        image, text = graphs("image", pixels[:rows]), graphs("text", tokens[:rows], mask[:rows])
        require_equal(what.encoder.encode_image(pixels[:rows]), image, "the image tower")
        ours = what.encoder.encode_text(tokens[:rows], mask[:rows])
        require_equal(ours, text, "the text tower")
    cost = {} if what.int8 is None else {"int8": what.int8(graphs, _quantised(folder, scale))}
    own = write_tokenizer(what.spec, folder)
    write_json(
        folder / "mmscale.json",
        {
            "preprocess": preprocessing(what.spec),
            "tokenizer": "." if own else "open_clip.get_tokenizer('ViT-B-32')",
            "context_length": what.spec.context_length,
            "pad_token": what.spec.pad_token,
            "logit_scale": scale,
            **cost,
        },
    )


def _longest(what: Exported) -> int:
    return max(what.spec.context_length, 2)


def _write(module: nn.Module, inputs: tuple[Tensor, ...], shapes: Any, path: Path) -> None:
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module.eval(),
                inputs,
                path,
                input_names=list(shapes),
                output_names=[f"{path.stem}_features"],
                dynamic_shapes=shapes,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    finally:
        logging.disable(before)


def _quantised(folder: Path, logit_scale: float) -> Graphs:
    """Put graphs in int8 in the place of those that lie there."""
    from onnxruntime.quantization import quantize_dynamic

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        for name in GRAPHS:
            whole = (folder / f"{name}.onnx").rename(folder / f"{name}{_WHOLE}")
            quantize_dynamic(whole, folder / f"{name}.onnx")
            whole.unlink()
    finally:
        logging.disable(before)
    return Graphs(folder, ".onnx", logit_scale)
