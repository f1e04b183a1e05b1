"""To a folder of the class that `model.preset=hf:NAME` came from, such as `CLIPModel`."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import MODEL_MAPPING, AutoTokenizer

from mmscale.checkpoint.export import (
    Exported,
    InexpressibleError,
    require_equal,
    write_json,
    write_tokenizer,
)
from mmscale.checkpoint.export_hf import processor
from mmscale.model.hf_models import PRESET, class_for

_CAPTIONS = ["a dog runs", "two children play in the deep snow"]


def write_clip(what: Exported, folder: Path) -> None:
    """Model, tokenizer and preprocessing; loaded back and compared.

    Raises:
        ConfigError: The folder gives other embeddings or other tokens.
    """
    towers: Any = what.encoder.model
    image, text = towers.vision.trunk, towers.text.trunk
    model = _class_of(image)(deepcopy(image.config)).eval()
    tensors = {**image.state_dict(), **text.state_dict()}
    scale = torch.tensor(what.encoder.logit_scale()).log()
    tensors["logit_scale"] = scale.reshape(model.logit_scale.shape)
    if hasattr(model, "logit_bias"):
        # Without a bias the objective was trained without one.
        bias = torch.zeros(1) if towers.scale.bias is None else towers.scale.bias
        tensors["logit_bias"] = bias.reshape(model.logit_bias.shape)
    model.load_state_dict(tensors)
    model.save_pretrained(folder)
    write_tokenizer(what.spec, folder)
    write_json(folder / "preprocessor_config.json", processor(what))
    _check(what, folder)


def _class_of(half: Any) -> Any:
    return class_for(half.config, MODEL_MAPPING, str(half.config.name_or_path), PRESET)


def _check(what: Exported, folder: Path) -> None:
    """Compare what transformers loads from the folder alone."""
    tower: Any = what.encoder.model.get_submodule("text")
    model = _class_of(tower.trunk).from_pretrained(folder).eval()
    pixels, tokens = what.sample()
    image = model.get_image_features(pixel_values=pixels).pooler_output
    mask = (tokens != what.spec.pad_token).flip(1).cumsum(1).flip(1) > 0
    words: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask.long()}
    if tower.whole_rows:
        missing = max(tower.whole_rows - tokens.shape[1], 0)
        words = {"input_ids": F.pad(tokens, (0, missing), value=tower.pad_token)}
    text = model.get_text_features(**words).pooler_output
    require_equal(what.encoder.encode_image(pixels), image, "the image tower")
    require_equal(what.encoder.encode_text(tokens), text, "the text tower")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    length = what.spec.context_length
    if tokenizer(_CAPTIONS, truncation=True, max_length=length)["input_ids"] != (
        what.spec.tokenize(_CAPTIONS)
    ):
        raise InexpressibleError("the folder's tokenizer gives other tokens than the run's")
