"""Towers by name, with the input each was made for.

Image towers: pixels [b c h w] -> features [b f]; text towers: tokens [b t], mask [b t] -> features
[b f].
"""

from collections.abc import Callable

from mmscale.config.model import TextConfig, VisionConfig
from mmscale.model.freezing import apply_settings
from mmscale.model.hf_text import build_hf_text
from mmscale.model.hf_vision import build_hf_vision
from mmscale.model.inputs import ImageInput, TextInput
from mmscale.model.sources import parse_source
from mmscale.model.timm_vision import build_timm_vision
from mmscale.model.tower import Tower

ImageBuilder = Callable[[str, VisionConfig, int | None], tuple[Tower, ImageInput]]


def _build_openclip_vision(
    name: str, config: VisionConfig, image_size: int | None
) -> tuple[Tower, ImageInput]:
    # Importing open_clip takes seconds: only for runs that use it.
    from mmscale.model.openclip_towers import build_openclip_vision

    return build_openclip_vision(name, config, image_size)


IMAGE_BUILDERS: dict[str, ImageBuilder] = {
    "timm": build_timm_vision,
    "hf": build_hf_vision,
    "openclip": _build_openclip_vision,
}


def build_vision(config: VisionConfig, image_size: int | None) -> tuple[Tower, ImageInput]:
    """The image tower that `model.vision` asks for; its widths are read from the model.

    Args:
        config: `model.vision`.
        image_size: `data.image_size`, pixels; None takes the tower's own.

    Raises:
        ConfigError: The name, an option or the weights cannot be had.
        CheckpointError: A weights file does not fit.
    """
    source, name = parse_source(config, "model.vision", IMAGE_BUILDERS)
    tower, pixels = IMAGE_BUILDERS[source](name, config, image_size)
    apply_settings(tower, config, "model.vision")
    return tower, pixels.override(config)


TextBuilder = Callable[[str, TextConfig], tuple[Tower, TextInput]]


def _build_openclip_text(name: str, config: TextConfig) -> tuple[Tower, TextInput]:
    # Importing open_clip takes seconds: only for runs that use it.
    from mmscale.model.openclip_towers import build_openclip_text

    return build_openclip_text(name, config)


TEXT_BUILDERS: dict[str, TextBuilder] = {"hf": build_hf_text, "openclip": _build_openclip_text}


def build_text(config: TextConfig) -> tuple[Tower, TextInput]:
    """The text tower that `model.text` asks for; its widths are read from the model.

    Raises:
        ConfigError: The name, an option or the weights cannot be had.
        CheckpointError: A weights file does not fit.
    """
    source, name = parse_source(config, "model.text", TEXT_BUILDERS)
    tower, tokens = TEXT_BUILDERS[source](name, config)
    apply_settings(tower, config, "model.text")
    return tower, tokens
