"""To a folder that Hugging Face's `VisionTextDualEncoderModel.from_pretrained` loads."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from mmscale.checkpoint.export import (
    Exported,
    InexpressibleError,
    linear_map,
    require_equal,
    require_no_offset,
    write_json,
    write_tokenizer,
)

_BICUBIC, _BILINEAR = 3, 2  # PIL's numbers


def write_hf(what: Exported, folder: Path) -> None:
    """Model, tokenizer and preprocessing; loaded back and compared.

    Raises:
        ConfigError: The class cannot express a part of the model.
    """
    towers: Any = what.encoder.model
    for part in ("vision", "text"):
        if not isinstance(getattr(towers.get_submodule(part), "trunk", None), PreTrainedModel):
            raise InexpressibleError(
                f"model.{part}.name={getattr(what.config.model, part).name}: a "
                "VisionTextDualEncoderModel takes Hugging Face towers"
            )
    _require_own_pooling(what)
    matrices = {}
    for modality, part in (("image", "vision"), ("text", "text")):
        width = towers.get_submodule(part).width
        matrix, offset = linear_map(towers.head[modality], width, f"the {modality} head")
        require_no_offset(offset, f"the {modality} head")
        matrices[modality] = matrix
    vision, text = towers.vision.trunk, towers.text.trunk
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        vision.config, text.config, projection_dim=what.config.model.embed_dim
    )
    model = VisionTextDualEncoderModel(config, vision, text).eval()
    model.visual_projection.weight.copy_(matrices["image"])
    model.text_projection.weight.copy_(matrices["text"])
    model.logit_scale.copy_(torch.tensor(what.encoder.logit_scale()).log())
    model.save_pretrained(folder)
    write_tokenizer(what.spec, folder)
    write_json(folder / "preprocessor_config.json", processor(what))
    _check(what, folder)


def _require_own_pooling(what: Exported) -> None:
    """The class takes the towers' own pooled output."""
    pixels, tokens = what.sample()
    towers: Any = what.encoder.model
    vision = towers.vision.trunk(pixel_values=pixels)
    text = towers.text.trunk(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    if getattr(vision, "pooler_output", None) is None:
        raise InexpressibleError(
            f"model.vision.name={what.config.model.vision.name}: its CLS token or mean is the "
            "feature, and a VisionTextDualEncoderModel takes a pooler's output"
        )
    pooling = getattr(towers.text, "pooling", "model")
    if pooling != "model" or getattr(text, "pooler_output", None) is None:
        raise InexpressibleError(
            f"model.text.pooling={pooling}: a VisionTextDualEncoderModel takes the output of the "
            "tower's own pooler"
        )


def processor(what: Exported) -> dict[str, object]:
    """The evaluation transform in transformers' words: `preprocessor_config.json`."""
    spec = what.spec
    square = {"height": spec.image_size, "width": spec.image_size}
    is_squashed = spec.resize == "squash"
    return {
        "image_processor_type": "SiglipImageProcessor" if is_squashed else "CLIPImageProcessor",
        "do_resize": True,
        "size": square if is_squashed else {"shortest_edge": spec.image_size},
        "resample": _BILINEAR if spec.interpolation == "bilinear" else _BICUBIC,
        "do_center_crop": not is_squashed,
        "crop_size": None if is_squashed else square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }


def _check(what: Exported, folder: Path) -> None:
    model = VisionTextDualEncoderModel.from_pretrained(folder).eval()
    pixels, tokens = what.sample()
    mask = (tokens != what.spec.pad_token).flip(1).cumsum(1).flip(1) > 0
    output = model(input_ids=tokens, pixel_values=pixels, attention_mask=mask.long())
    require_equal(what.encoder.encode_image(pixels), output.image_embeds, "the image tower")
    require_equal(what.encoder.encode_text(tokens), output.text_embeds, "the text tower")
