"""Text towers by name: tokens and mask [b t] -> features [b f], with the tokenizer of each."""

from collections.abc import Callable

from mmscale.config.model import TextConfig
from mmscale.model.freezing import settle
from mmscale.model.hf_text import build_hf_text
from mmscale.model.inputs import TextInput
from mmscale.model.sources import parse_source
from mmscale.model.width import Tower

Builder = Callable[[str, TextConfig], tuple[Tower, TextInput]]


def _build_openclip_text(name: str, config: TextConfig) -> tuple[Tower, TextInput]:
    # Importing open_clip takes seconds: only for runs that use it.
    from mmscale.model.openclip_towers import build_openclip_text

    return build_openclip_text(name, config)


BUILDERS: dict[str, Builder] = {"hf": build_hf_text, "openclip": _build_openclip_text}


def build_text(config: TextConfig) -> tuple[Tower, TextInput]:
    """The text tower that `model.text` asks for; its widths are read from the model.

    Raises:
        ConfigError: The name, an option or the weights cannot be had.
        CheckpointError: A weights file does not fit.
    """
    source, name = parse_source(config, "model.text", BUILDERS)
    tower, tokens = BUILDERS[source](name, config)
    settle(tower, config, "model.text")
    return tower, tokens
