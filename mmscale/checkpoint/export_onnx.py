"""To two ONNX graphs, `image.onnx` (pixels) and `text.onnx` (tokens, mask), and their tokenizer."""

import logging
import warnings
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
    # Whether the extra is installed was asked before (`export_limits`).
    import onnxruntime

    pixels, tokens = what.sample()
    mask = (tokens != what.spec.pad_token).flip(1).cumsum(1).flip(1) > 0
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=_longest(what))
    _write(_Image(what.encoder), (pixels,), {"pixels": {0: batch}}, folder / "image.onnx")
    shapes = {"tokens": {0: batch, 1: length}, "mask": {0: batch, 1: length}}
    _write(_Text(what.encoder), (tokens, mask), shapes, folder / "text.onnx")
    for rows in (1, 2):
        image = _run(onnxruntime, folder / "image.onnx", {"pixels": pixels[:rows]})
        require_equal(what.encoder.encode_image(pixels[:rows]), image, "the image tower")
        fed = {"tokens": tokens[:rows], "mask": mask[:rows]}
        text = _run(onnxruntime, folder / "text.onnx", fed)
        ours = what.encoder.encode_text(tokens[:rows], mask[:rows])
        require_equal(ours, text, "the text tower")
    own = write_tokenizer(what.spec, folder)
    write_json(
        folder / "mmscale.json",
        {
            "preprocess": preprocessing(what.spec),
            "tokenizer": "." if own else "open_clip.get_tokenizer('ViT-B-32')",
            "context_length": what.spec.context_length,
            "pad_token": what.spec.pad_token,
            "logit_scale": what.encoder.logit_scale(),
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


def _run(onnxruntime: Any, path: Path, inputs: dict[str, Tensor]) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    fed = {name: tensor.numpy() for name, tensor in inputs.items()}
    return torch.from_numpy(session.run(None, fed)[0])
