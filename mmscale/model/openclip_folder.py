"""OpenCLIP models of a folder (`local-dir:`) or the hub (`hf-hub:`): what they may say."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
from open_clip.factory import get_model_config, parse_model_name
from open_clip.pretrained import download_pretrained_from_hf, get_pretrained_cfg

from mmscale.errors import ConfigError
from mmscale.model.foreign import require_harmless, require_harmless_tokenizer
from mmscale.model.hf_models import read_json, small_files

# A name on the hub; anything else is a path.
_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
# A path: that of the model's own folder, wherever it lies.
OWN_FOLDER = "./"
_PIXELS = ("mean", "std", "interpolation", "resize_mode")


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


def openclip_files(name: str, weights: str) -> Iterator[tuple[str, Any]]:
    """What a model that OpenCLIP alone cannot build again needs besides weights, by file name.

    Args:
        name: As in `openclip:NAME`.
        weights: `model.weights`; one of OpenCLIP's tags has a preprocessing of its own.
    """
    config = get_model_config(name)
    text = config["text_cfg"]
    tower, tokens = text.get("hf_model_name"), text.get("hf_tokenizer_name")
    if parse_model_name(name)[0] is None and not tower and not tokens:
        return
    require_own_parts(config, name, f"openclip:{name}")
    kept: dict[str, bytes] = {}
    for source in (text.get("hf_model_name"), text.get("hf_tokenizer_name")):
        if source:
            kept = {**dict(small_files(source, is_text=True)), **kept}
    if tower:
        text["hf_model_name"] = OWN_FOLDER
    facts = _preprocessing(name, weights)
    yield "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": facts}
    yield from kept.items()


def _preprocessing(name: str, weights: str) -> dict[str, Any]:
    """`preprocess_cfg` of a model's folder or page, or of the tag of one that is built in."""
    source, rest = parse_model_name(name)
    if source is None:
        facts = get_pretrained_cfg(name, weights)
        return {key: facts[key] for key in _PIXELS if key in facts}
    file = "open_clip_config.json"
    on_hub = source == "hf-hub"
    path = download_pretrained_from_hf(rest, filename=file) if on_hub else Path(rest, file)
    return json.loads(Path(path).read_text("utf-8")).get("preprocess_cfg", {})
