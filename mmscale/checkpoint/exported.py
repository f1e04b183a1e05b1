"""What `mmscale export` wrote, read back as a model's first weights by the names that it has here.

Formats that keep tensors by name: `open_clip`, `hf`, `clip`, `sentence_transformers`. The last one
has no logit scale: it stays what the settings say.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING

from mmscale.checkpoint.files import below_adapters, fill
from mmscale.config.model import ModelConfig
from mmscale.errors import ConfigError
from mmscale.model.hf_models import WHOLE, build_hf_model, class_for, read_whole
from mmscale.model.weights import read_weights

_KEY = "model.weights"
_SCALES = ("logit_scale", "logit_bias")
_SIDES = {"image": "vision", "text": "text"}
# Text towers of OpenCLIP's keep their projection under this name, Hugging Face's under another.
_OPENCLIP_TEXT = "text_projection"


@dataclass(frozen=True)
class ExportFolder:
    """A folder that `mmscale export` wrote.

    Attributes:
        folder: Where it lies.
        kind: The format: `open_clip`, `hf` (for `clip` too), `sentence_transformers`.
    """

    folder: Path
    kind: str

    def load_weights(self, model: nn.Module, but: tuple[str, ...] = ()) -> None:
        """Fill the model's parameters and buffers.

        Args:
            model: A `TwoTower`.
            but: Tensors whose names begin so keep what they are.

        Raises:
            ConfigError: A file of the folder cannot be had.
            CheckpointError: The model is another; names the first differing tensors.
        """
        towers: Any = model
        is_whole = isinstance(towers.head["image"], nn.Identity)
        read = {
            "open_clip": _open_clip,
            "hf": _hugging_face,
            "sentence_transformers": _sentence_transformers,
        }[self.kind]
        theirs = dict(read(self.folder, is_whole))
        own = below_adapters(model.state_dict())
        if "scale.log_scale" not in theirs:
            theirs["scale.log_scale"] = own["scale.log_scale"]
        theirs = dict(_fitted(theirs, own))
        shapes = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
        fill(own, shapes, theirs.__getitem__, f"{self.folder}: an export", but)


def export_at(folder: Path) -> ExportFolder | None:
    """The export that a folder holds; None where it holds none.

    Raises:
        ConfigError: It is one that keeps no tensors by name.
    """
    if (folder / "open_clip_config.json").is_file():
        return ExportFolder(folder, "open_clip")
    if (folder / "router_config.json").is_file():
        return ExportFolder(folder, "sentence_transformers")
    if _model_type(folder / "config.json") in WHOLE:
        return ExportFolder(folder, "hf")
    for file, why in (
        ("image.onnx", "ONNX graphs, which keep no tensors by the names of a model"),
        ("trained.safetensors", "adapters without the towers below them"),
    ):
        if (folder / file).is_file():
            raise ConfigError(
                f"{_KEY}={folder} holds {why}: name the run that they come from, or another export "
                f"of it, such as --to open_clip."
            )
    return None


def _model_type(file: Path) -> str | None:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return content.get("model_type") if isinstance(content, dict) else None


def _open_clip(folder: Path, is_whole: bool) -> Iterator[tuple[str, Tensor]]:
    tensors = read_weights(str(folder / "open_clip_model.safetensors"), _KEY)
    yield from _scale(tensors)
    own_text = any(name.startswith("text.") for name in tensors)
    from_hf = "text.proj.weight" in tensors and not is_whole
    from_timm = any(name.startswith("visual.trunk.") for name in tensors) and not is_whole
    for name, tensor in tensors.items():
        if name in _SCALES:
            continue
        if name.startswith("visual."):
            part, rest = "vision", name.removeprefix("visual.")
            projections = {"head.proj.weight": tensor, "head.proj.bias": tensor}
            projections = projections if from_timm else {"proj": tensor.T}
            prefix = "trunk." if from_timm else ""
        else:
            part, rest = "text", name.removeprefix("text.") if own_text else name
            projections = {
                "proj.weight": tensor,
                f"{_OPENCLIP_TEXT}.weight": tensor,
                f"{_OPENCLIP_TEXT}.bias": tensor,
                _OPENCLIP_TEXT: tensor.T,
            }
            prefix = "transformer." if from_hf else ""
        if is_whole or rest not in projections:
            yield f"{part}.trunk.{rest.removeprefix(prefix)}", tensor
        else:
            side = "image" if part == "vision" else "text"
            kind = "bias" if rest.endswith(".bias") else "weight"
            yield f"head.{side}.layers.0.{kind}", projections[rest].contiguous()


def _hugging_face(folder: Path, is_whole: bool) -> Iterator[tuple[str, Tensor]]:
    path, whole = read_whole(str(folder.resolve()))
    taken = ModelConfig(weights="pretrained")
    model = build_hf_model(class_for(whole, MODEL_MAPPING, path, _KEY), whole, path, taken, _KEY)
    tensors = model.state_dict()
    yield from _scale(tensors)
    parts = {"vision": ("vision_model.", "visual_"), "text": ("text_model.", "text_projection")}
    for part, (prefix, projection) in parts.items():
        for name, tensor in tensors.items():
            if name.startswith(prefix):
                rest = name if is_whole else name.removeprefix(prefix)
                yield f"{part}.trunk.{rest}", tensor
            elif name.startswith(projection):
                side = "image" if part == "vision" else "text"
                end = name.rpartition(".")[2]
                yield (
                    (f"{part}.trunk.{name}" if is_whole else f"head.{side}.layers.0.{end}"),
                    tensor,
                )


def _sentence_transformers(folder: Path, is_whole: bool) -> Iterator[tuple[str, Tensor]]:
    structure = json.loads((folder / "router_config.json").read_text("utf-8"))["structure"]
    for side, part in _SIDES.items():
        for module in structure[side]:
            file = folder / str(module) / "model.safetensors"
            if not file.is_file():
                continue
            is_head = module.endswith("_Dense")
            for name, tensor in read_weights(str(file), _KEY).items():
                if is_head:
                    yield f"head.{side}.layers.0.{name.removeprefix('linear.')}", tensor
                else:
                    yield f"{part}.trunk.{name.removeprefix('timm_model.')}", tensor


def _scale(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, own in zip(_SCALES, ("scale.log_scale", "scale.bias"), strict=True):
        if name in tensors:
            yield own, tensors[name].reshape(1)


def _fitted(
    theirs: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Their tensors, but for those that change nothing and are in one of both only."""
    for name, tensor in theirs.items():
        if name in own or not _is_nothing(name, tensor):
            yield name, tensor
    for side in _SIDES:
        bias = f"head.{side}.layers.0.bias"
        if bias in own and bias not in theirs:
            yield bias, torch.zeros_like(own[bias])


def _is_nothing(name: str, tensor: Tensor) -> bool:
    """Whether a tensor that the model has no place for can be left out."""
    if name == "scale.bias":
        return not bool(tensor.any())
    if name.startswith("head.") and tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1]:
        return bool(torch.equal(tensor, torch.eye(len(tensor), dtype=tensor.dtype)))
    # sentence-transformers builds a pooler that no pooling of tokens reads.
    return name.startswith("text.trunk.pooler.")
