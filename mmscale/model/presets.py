"""Named pairs of towers, and how explicit settings win over them."""

from collections.abc import Mapping
from typing import Any

from mmscale.config.model import ModelConfig
from mmscale.errors import ConfigError
from mmscale.model.sources import did_you_mean

OPENCLIP = "openclip:"
HF = "hf:"

PRESETS: dict[str, dict[str, Any]] = {
    "small": {
        "vision": {"name": "timm:vit_small_patch16_224"},
        "text": {"name": "hf:microsoft/MiniLM-L12-H384-uncased"},
        "embed_dim": 384,
    },
    "medium": {
        "vision": {"name": "timm:vit_base_patch16_224"},
        "text": {"name": "hf:flaubert/flaubert_small_cased"},
        "embed_dim": 512,
    },
    "medium-mobilebert": {
        "vision": {"name": "timm:vit_base_patch16_224"},
        "text": {"name": "hf:google/mobilebert-uncased"},
        "embed_dim": 512,
    },
    "large": {
        "vision": {"name": "timm:vit_base_patch16_224"},
        "text": {"name": "hf:google-bert/bert-base-uncased"},
        "embed_dim": 768,
    },
}


def fill_preset(config: ModelConfig, failing: Mapping[str, str] | None = None) -> ModelConfig:
    """`config` with what its preset says and the user did not; filled again it stays the same.

    Args:
        config: `model`.
        failing: Towers that a preset must not bring here, and what it brings in their place.

    Raises:
        ConfigError: There is no such preset.
    """
    if config.preset is None:
        return config
    settings = _settings(config.preset)
    for tower in ("vision", "text"):
        name = settings[tower]["name"]
        settings[tower] = {"name": (failing or {}).get(name, name)}
    words = config.model_dump(exclude_unset=True)
    for tower in ("vision", "text"):
        chosen = words.get(tower, {})
        name = chosen.get("name") or settings[tower]["name"]
        settings[tower] = {**chosen, "name": name}
    return ModelConfig.model_validate({**words, **settings, **_explicit(words)})


def stand_in_line(asked: ModelConfig, filled: ModelConfig) -> str | None:
    """What to tell where `fill_preset` put a stand-in into a preset."""
    usual = fill_preset(asked)
    for tower in ("vision", "text"):
        name, stand_in = getattr(usual, tower).name, getattr(filled, tower).name
        if name != stand_in:
            return (
                f"model.preset={asked.preset} takes {stand_in} in place of {name}, which is known "
                f"to fail here; model.{tower}.name={name} takes it all the same"
            )
    return None


def is_whole_openclip(config: ModelConfig) -> bool:
    """Whether a filled config asks for an OpenCLIP model as it is, with its own projections."""
    preset = config.preset or ""
    return preset.startswith(OPENCLIP) and config.vision.name == config.text.name == preset


def is_whole_hf(config: ModelConfig) -> bool:
    """Whether a filled config asks for a model of Hugging Face's with its own projections."""
    preset = config.preset or ""
    return preset.startswith(HF) and config.vision.name == config.text.name == preset


def is_whole(config: ModelConfig) -> bool:
    """Whether a filled config asks for both towers of one model, as it is."""
    return is_whole_openclip(config) or is_whole_hf(config)


def require_taken_as_it_is(config: ModelConfig, called: str, width: int, pooling: bool) -> None:
    """Refuse settings of towers and heads that a whole model does not take.

    Args:
        config: `model`, filled.
        called: The model, in a sentence.
        width: Of its embeddings.
        pooling: Its towers' pooling has a rule of its own.

    Raises:
        ConfigError: There is such a setting.
    """
    if config.embed_dim != width:
        raise ConfigError(
            f"model.embed_dim={config.embed_dim}, but {called} is {width} wide; leave "
            f"model.embed_dim out, or name the towers (model.vision.name, model.text.name)."
        )
    settings = ".options and .weights" if pooling else ".options, .weights and .pooling"
    for part in ("vision", "text"):
        tower = getattr(config, part)
        is_own = tower.weights in ("pretrained", "random") and (pooling or tower.pooling == "auto")
        if tower.options or not is_own:
            raise ConfigError(
                f"model.{part}{settings} do not go with model.preset={config.preset}, which is "
                f"taken as it is: leave them out, or name the towers and no preset."
            )
    asked = config.head.model_dump(exclude_defaults=True)
    if asked:
        setting, value = next(iter(asked.items()))
        raise ConfigError(
            f"model.head.{setting}={value}, but model.preset={config.preset} has no head of ours; "
            f"leave model.head out, or name the towers and no preset."
        )


def _explicit(words: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in words.items() if name not in ("vision", "text")}


def _settings(preset: str) -> dict[str, Any]:
    if preset.startswith(OPENCLIP):
        # OpenCLIP takes seconds to import, and only its own presets need it.
        from mmscale.model.openclip_towers import openclip_config

        whole = openclip_config(preset.removeprefix(OPENCLIP), "model.preset")
        towers = {"vision": {"name": preset}, "text": {"name": preset}}
        return {**towers, "embed_dim": whole["embed_dim"]}
    if preset.startswith(HF):
        from mmscale.model.hf_models import read_whole, width_of

        _, config = read_whole(preset.removeprefix(HF))
        towers = {"vision": {"name": preset}, "text": {"name": preset}}
        return {**towers, "embed_dim": width_of(config), "weights": "pretrained"}
    if preset not in PRESETS:
        raise ConfigError(
            f"model.preset={preset} does not exist{did_you_mean(preset, PRESETS)}: choose one of "
            f"{', '.join(PRESETS)}, hf:NAME_OR_PATH or openclip:NAME."
        )
    return dict(PRESETS[preset])
