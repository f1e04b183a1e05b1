"""To files that `open_clip.create_model_and_transforms('local-dir:OUT')` loads."""

import logging
import math
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import TextTransformer, VisionTransformer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmscale.checkpoint.export import (
    Exported,
    InexpressibleError,
    linear_map,
    preprocessing,
    require_equal,
    require_no_offset,
    timm_parts,
    write_json,
    write_tokenizer,
)
from mmscale.model.openclip_towers import openclip_config
from mmscale.model.presets import OPENCLIP, is_whole_openclip

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
_POOLERS = {
    "mean": "mean_pooler",
    "cls": "cls_last_hidden_state_pooler",
    "model": "cls_pooler",
}
# OpenCLIP reads a `local-dir:` model's tokenizer from that folder, whatever this says.
_BESIDE = "./"
_MOVED = """# An OpenCLIP model with a text tower of Hugging Face's

OpenCLIP looks for the text tower's `config.json` where `hf_model_name` in `open_clip_config.json`
says, which is the folder that this was written to. From anywhere else, say where it lies:

```python
import json

import open_clip

folder = "PATH OF THIS FOLDER"
with open(f"{folder}/open_clip_config.json") as file:
    text_cfg = json.load(file)["model_cfg"]["text_cfg"]
model, _, transform = open_clip.create_model_and_transforms(
    f"local-dir:{folder}", text_cfg={**text_cfg, "hf_model_name": folder}
)
tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
```

mmscale needs no such words: `openclip:local-dir:FOLDER` finds the tower in the folder.
"""


def write_openclip(what: Exported, folder: Path) -> None:
    """Configuration, weights and tokenizer; loaded back and compared.

    Raises:
        ConfigError: OpenCLIP cannot express a part of the model.
    """
    whole = is_whole_openclip(what.config.model)
    settings, tensors = _whole(what, folder) if whole else _pair(what, folder)
    scale = what.encoder.model.scale
    tensors["logit_scale"] = torch.tensor(math.log(float(scale())))
    bias = getattr(scale, "bias", None)
    if bias is not None:
        settings["init_logit_bias"] = float(bias)
        tensors["logit_bias"] = bias.detach().reshape(())
    text = settings["text_cfg"]
    if write_tokenizer(what.spec, folder):
        text["hf_tokenizer_name"] = _BESIDE
    if "hf_model_name" in text:
        text |= {"hf_model_name": str(folder.resolve()), "hf_model_pretrained": False}
        if what.page is None:
            (folder / "README.md").write_text(_MOVED)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    content = {"model_cfg": settings, "preprocess_cfg": preprocessing(what.spec)}
    write_json(folder / CONFIG, content)
    _check(what, folder)
    if "hf_model_name" in text:
        text["hf_model_name"] = what.page or str(what.out.resolve())
    if what.page is not None and "hf_tokenizer_name" in text:
        # Of a page, OpenCLIP takes the tokenizer from where this says.
        text["hf_tokenizer_name"] = what.page
    write_json(folder / CONFIG, content)


def _whole(what: Exported, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A model of OpenCLIP's own, as it was taken."""
    name = str(what.config.model.preset).removeprefix(OPENCLIP)
    settings = openclip_config(name, "model.preset")
    settings["vision_cfg"]["image_size"] = what.spec.image_size
    towers: Any = what.encoder.model
    tensors = {f"visual.{name}": t for name, t in towers.vision.trunk.state_dict().items()}
    text = towers.text.trunk.state_dict()
    if isinstance(towers.text.trunk, HFTextEncoder):
        towers.text.trunk.config.save_pretrained(folder)
    else:
        settings["text_cfg"]["context_length"] = towers.text.trunk.context_length
    custom = settings.get("custom_text") or "hf_model_name" in settings["text_cfg"]
    tensors |= {f"text.{name}" if custom else name: t for name, t in text.items()}
    return settings, tensors


def _pair(what: Exported, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Two towers of different origin with linear heads, in the layout of a custom text tower."""
    vision, tensors = _vision(what)
    text, text_tensors = _text(what, folder)
    settings = {
        "embed_dim": what.config.model.embed_dim,
        "custom_text": True,
        "vision_cfg": vision,
        "text_cfg": text,
    }
    return settings, tensors | text_tensors


def _vision(what: Exported) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = what.config.model.vision
    tower: Any = what.encoder.model.vision
    kind, _, name = str(config.name).partition(":")
    matrix, offset = linear_map(what.encoder.model.head["image"], tower.width, "the image head")
    trunk = tower.trunk.state_dict()
    if kind == "timm":
        settings = {
            "timm_model_name": timm_parts(name)[0],
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "timm_proj_bias": bool(offset.abs().max() > 0),
            "image_size": what.spec.image_size,
        }
        tensors = {f"visual.trunk.{key}": tensor for key, tensor in trunk.items()}
        tensors["visual.head.proj.weight"] = matrix
        if settings["timm_proj_bias"]:
            tensors["visual.head.proj.bias"] = offset
        return settings, tensors
    if kind == "openclip" and isinstance(tower.trunk, VisionTransformer):
        require_no_offset(offset, "the image head")
        settings = openclip_config(name, "model.vision.name")["vision_cfg"] | config.options
        settings["image_size"] = what.spec.image_size
        tensors = {f"visual.{key}": tensor for key, tensor in trunk.items()}
        return settings, tensors | {"visual.proj": matrix.T}
    raise InexpressibleError(
        f"model.vision.name={config.name}: OpenCLIP's custom layout takes timm towers and its own "
        "transformers"
    )


def _text(what: Exported, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = what.config.model.text
    tower: Any = what.encoder.model.text
    name = str(config.name).partition(":")[2]
    matrix, offset = linear_map(what.encoder.model.head["text"], tower.width, "the text head")
    trunk = tower.trunk.state_dict()
    if isinstance(tower.trunk, PreTrainedModel):
        require_no_offset(offset, "the text head")
        if tower.pooling not in _POOLERS:
            raise InexpressibleError(
                f"model.text.pooling={tower.pooling}: OpenCLIP pools Hugging Face towers by "
                f"{', '.join(_POOLERS)}"
            )
        tower.trunk.config.save_pretrained(folder)
        settings: dict[str, Any] = {
            "hf_model_name": str(folder.resolve()),
            "hf_model_pretrained": False,
            "hf_proj_type": "linear",
            "hf_pooler_type": _POOLERS[tower.pooling],
            "context_length": what.spec.context_length,
        }
        tensors = {f"text.transformer.{key}": tensor for key, tensor in trunk.items()}
        return settings, tensors | {"text.proj.weight": matrix}
    if isinstance(tower.trunk, TextTransformer):
        settings = openclip_config(name, "model.text.name")["text_cfg"] | config.options
        settings["context_length"] = tower.trunk.context_length
        tensors = {f"text.{key}": tensor for key, tensor in trunk.items()}
        if offset.abs().max() > 0:
            settings["proj_bias"] = True
            tensors |= {"text.text_projection.weight": matrix, "text.text_projection.bias": offset}
        else:
            tensors["text.text_projection"] = matrix.T
        return settings, tensors
    raise InexpressibleError(
        f"model.text.name={config.name}: OpenCLIP's custom layout takes Hugging Face towers and "
        "its own transformers"
    )


def _check(what: Exported, folder: Path) -> None:
    """Load the files with OpenCLIP and compare embeddings.

    Raises:
        ConfigError: They differ, or OpenCLIP builds other tensors.
    """
    model = _load(what, folder)
    pixels, tokens = what.sample()
    context = model.context_length or tokens.shape[1]
    padded = nn.functional.pad(
        tokens, (0, max(0, context - tokens.shape[1])), value=what.spec.pad_token
    )
    require_equal(what.encoder.encode_image(pixels), model.encode_image(pixels), "the image tower")
    require_equal(what.encoder.encode_text(tokens), model.encode_text(padded), "the text tower")


def _load(what: Exported, folder: Path) -> Any:
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        return open_clip.create_model(f"local-dir:{folder}").eval()
    except RuntimeError as error:
        raise InexpressibleError(
            f"OpenCLIP builds another model from {what.config.model.vision.name} and "
            f"{what.config.model.text.name}: {' '.join(str(error).split())[:300]}"
        ) from error
    finally:
        logging.disable(before)
