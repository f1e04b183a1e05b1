"""OpenCLIP models of a folder (`local-dir:`) or the hub (`hf-hub:`): what they may say."""

import re
from pathlib import Path
from typing import Any

import timm
from open_clip.factory import parse_model_name

from mmscale.errors import ConfigError
from mmscale.model.foreign import require_harmless, require_harmless_tokenizer
from mmscale.model.hf_models import read_json

# A name on the hub; anything else is a path.
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def is_on_hub(name: str) -> bool:
    """Whether an OpenCLIP name is one of the hub's rather than built in."""
    return name.startswith("hf-hub:")


def folder_of(name: str) -> Path | None:
    """The folder that an OpenCLIP name points to; None for one that is built in or on the hub."""
    source, rest = parse_model_name(name)
    return Path(rest) if source == "local-dir" else None


def require_own_parts(config: dict[str, Any], name: str, setting: str) -> None:
    """See that a configuration names nothing but architectures and harmless words.

    A text tower of Hugging Face's that is named by a path is read from the model's own folder,
    wherever that lies now.

    Args:
        config: As in `open_clip_config.json` under `model_cfg`; changed in place.
        name: Of the OpenCLIP model.
        setting: Setting and value that asked for it, for messages.

    Raises:
        ConfigError: A part is missing, or names code, or a folder elsewhere.
    """
    require_harmless(config, setting)
    for part in ("vision_cfg", "text_cfg"):
        if not isinstance(config.get(part), dict):
            raise ConfigError(
                f"{setting}: its configuration has no {part}; give an OpenCLIP model."
            )
    if not isinstance(config.get("embed_dim"), int):
        raise ConfigError(f"{setting}: its configuration has no embed_dim; give an OpenCLIP model.")
    vision, text = config["vision_cfg"], config["text_cfg"]
    image_tower = vision.get("timm_model_name")
    if image_tower and not timm.is_model(image_tower):
        raise ConfigError(
            f"{setting}: its timm_model_name={image_tower} is not a model of timm "
            f"{timm.__version__}; name one that timm builds itself."
        )
    require_harmless_tokenizer(text.get("tokenizer_kwargs"), setting)
    for key in ("hf_model_name", "hf_tokenizer_name"):
        if text.get(key):
            text[key] = _own(str(text[key]), key, name, setting)
            for file in ("config.json", "tokenizer_config.json"):
                read_json(text[key], file)


def _own(named: str, key: str, name: str, setting: str) -> str:
    """A name on the hub as it is; a path, such as an export's, only as the model's own folder."""
    folder = folder_of(name)
    if folder is not None and key == "hf_tokenizer_name":
        return str(folder)  # OpenCLIP looks nowhere else
    if _HUB_NAME.fullmatch(named) and ".." not in named:
        return named
    if folder is None or not (folder / "config.json").is_file():
        raise ConfigError(
            f"{setting}: its {key}={named} names a folder elsewhere; put config.json and the "
            f"tokenizer of that tower beside open_clip_config.json."
        )
    return str(folder)
