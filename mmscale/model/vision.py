"""Image towers by name: pixels [b c h w] -> features [b f], and the input each was made for."""

from collections.abc import Callable

from mmscale.config.model import VisionConfig
from mmscale.model.freezing import settle
from mmscale.model.hf_vision import build_hf_vision
from mmscale.model.inputs import ImageInput
from mmscale.model.sources import parse_source
from mmscale.model.timm_vision import build_timm_vision
from mmscale.model.width import Tower

Builder = Callable[[str, VisionConfig, int | None], tuple[Tower, ImageInput]]


def _build_openclip_vision(
    name: str, config: VisionConfig, image_size: int | None
) -> tuple[Tower, ImageInput]:
    # Importing open_clip takes seconds: only for runs that use it.
    from mmscale.model.openclip_towers import build_openclip_vision

    return build_openclip_vision(name, config, image_size)


BUILDERS: dict[str, Builder] = {
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
    source, name = parse_source(config, "model.vision", BUILDERS)
    tower, pixels = BUILDERS[source](name, config, image_size)
    settle(tower, config, "model.vision")
    return tower, pixels.override(config)
