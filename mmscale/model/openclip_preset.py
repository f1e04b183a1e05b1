"""`model.preset=openclip:NAME`: a whole OpenCLIP model, its embeddings exactly its own.

Both towers keep OpenCLIP's projections and no head follows. Its weights come from `model.weights`:
`random`, one of OpenCLIP's tags, a file, or `pretrained`: those in its folder or on its page.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
from open_clip.factory import _find_checkpoint_in_dir, load_checkpoint
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIPTextCfg
from open_clip.pretrained import download_pretrained_from_hf
from torch import nn

from mmscale.config.model import ModelConfig
from mmscale.errors import CheckpointError, ConfigError
from mmscale.model.freezing import apply_settings
from mmscale.model.hub import hub_call
from mmscale.model.inputs import ImageInput, TextInput
from mmscale.model.openclip_folder import folder_of, is_on_hub
from mmscale.model.openclip_towers import (
    OpenClipText,
    OpenClipVision,
    openclip_config,
    openclip_pixels,
    openclip_tokens,
    require_own_pooling,
)
from mmscale.model.presets import OPENCLIP, require_taken_as_it_is
from mmscale.model.scale import LogitScale, take_scale
from mmscale.model.stretched import stretch_openclip
from mmscale.model.two_tower import TwoTower
from mmscale.model.weights import UNREADABLE, first_line, read_weights


def build_whole_openclip(
    config: ModelConfig, image_size: int | None, fill: bool = True
) -> tuple[TwoTower, ImageInput, TextInput]:
    """The model that a filled `model.preset=openclip:NAME` asks for.

    Args:
        config: `model`.
        image_size: `data.image_size`, pixels; None takes the model's own.
        fill: With its weights; without, its pixels are still normalised as those want it.

    Raises:
        ConfigError: A setting contradicts the OpenCLIP model, or its weights cannot be had.
        CheckpointError: A weights file does not fit.
    """
    name = str(config.preset).removeprefix(OPENCLIP)
    whole = openclip_config(name, "model.preset")
    for part in ("vision", "text"):
        require_own_pooling(getattr(config, part), f"model.{part}", name)
    require_taken_as_it_is(config, f"OpenCLIP's {name}", whole["embed_dim"], pooling=True)
    model = _create(name, config.weights, image_size, whole["text_cfg"], fill)
    pixels = openclip_pixels(model.visual.image_size, open_clip.get_model_preprocess_cfg(model))
    own = whole["text_cfg"].get("context_length", CLIPTextCfg.context_length)
    length = stretch_openclip(model.text, config.text.context_length, own)
    tokens = openclip_tokens(name, config.text, {**whole["text_cfg"], "context_length": length})
    _require_same_padding(model.text, tokens, name)
    scale = LogitScale(config.logit_scale, of_whole=True)
    if fill and config.weights != "random":
        origin = f"model.weights={config.weights} of openclip:{name}"
        take_scale(scale, model.logit_scale, model.logit_bias, origin)
    vision = OpenClipVision(model.visual, pixels.image_size)
    text = OpenClipText(model.text, tokens.pad_token)
    if getattr(model, "text_decoder", None) is not None:
        text.left_out = (
            f"warning: model.preset=openclip:{name} has a text decoder besides its towers: it is "
            f"left out, and no caption is generated"
        )
    apply_settings(vision, config.vision, "model.vision")
    apply_settings(text, config.text, "model.text")
    frozen = frozenset(part for part in ("vision", "text") if getattr(config, part).frozen is True)
    two_tower = TwoTower(
        vision,
        text,
        {"image": nn.Identity(), "text": nn.Identity()},
        scale,
        frozen,
    )
    return two_tower, pixels.override(config.vision), tokens


def _require_same_padding(text: Any, tokens: TextInput, name: str) -> None:
    """A text tower of Hugging Face's tells padding by its own configuration's id."""
    if not isinstance(text, HFTextEncoder) or text.config.pad_token_id == tokens.pad_token:
        return
    raise ConfigError(
        f"openclip:{name}: its tokenizer pads with {tokens.pad_token} and its text tower takes "
        f"{text.config.pad_token_id} for padding; set pad_token_id in the tower's config.json."
    )


def _create(
    name: str, weights: str, image_size: int | None, text: Mapping[str, Any], fill: bool
) -> Any:
    """The model with the weights that `model.weights` asks for, and never with others.

    OpenCLIP ignores what it is told about the weights of a folder or a page on the hub and takes
    those that it finds there: it only builds, and a file is read here.
    """
    tag = weights if weights in open_clip.list_pretrained_tags_by_model(name) else None
    words: dict[str, Any] = {
        "force_custom_text": True,
        "pretrained_text": False,
        "pretrained_image": False,
    }
    if image_size:
        words["force_image_size"] = image_size
    if "hf_model_name" in text:
        words["text_cfg"] = {**text, "hf_model_pretrained": False}
    if tag and not fill:
        words["force_preprocess_cfg"] = open_clip.get_pretrained_cfg(name, tag)
    what, bring, remote = _asked_for(name, weights, text, tag)
    with hub_call(what, bring, remote), _quiet():
        file = _weights_file(name, weights) if fill and not tag else None
        try:
            model = open_clip.create_model(
                name, pretrained=tag if fill else None, load_weights=bool(tag) and fill, **words
            )
        except (TypeError, AttributeError, LookupError, AssertionError) as error:
            raise ConfigError(
                f"{what}: OpenCLIP cannot build it from its configuration ({first_line(error)})."
            ) from error
    if file is not None:
        _fill(model, file, name, weights)
    return model


def _asked_for(
    name: str, weights: str, text: Mapping[str, Any], tag: str | None
) -> tuple[str, str, bool]:
    """What to call the model in a message, how to mend its absence, and if the hub may be asked."""
    what = f"model.weights={weights} of openclip:{name}"
    bring = "set model.weights to a file of its weights, or to random"
    tower = text.get("hf_model_name")
    if tower:
        bring = f"its text tower is hf:{tower}, bring that into the local cache"
    return what, bring, bool(tag) or is_on_hub(name) or bool(tower and not Path(tower).is_dir())


def _weights_file(name: str, weights: str) -> Path | None:
    """The file that `model.weights` means, where it means one."""
    if weights == "random":
        return None
    folder = folder_of(name)
    if weights == "pretrained" and (folder is not None or is_on_hub(name)):
        found = (
            download_pretrained_from_hf(name.removeprefix("hf-hub:"))
            if folder is None
            else _find_checkpoint_in_dir(folder)
        )
        if found is None:
            raise CheckpointError(
                f"model.weights=pretrained, but {folder} holds no weights; set model.weights to a "
                f"file of them, or to random."
            )
        return Path(found)
    file = Path(weights)
    if not file.is_file():
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise ConfigError(
            f"model.weights={weights} is neither `random`, a file, nor a tag of OpenCLIP's "
            f"{name} ({', '.join(tags[:8]) or 'it has none'})."
        )
    return file


def _fill(model: nn.Module, file: Path, name: str, weights: str) -> None:
    """Load a whole model's weights as OpenCLIP does, which knows several layouts of them."""
    read_weights(str(file), "model.weights")
    try:
        with _quiet():
            load_checkpoint(model, str(file))
    except UNREADABLE as error:
        raise CheckpointError(
            f"model.weights={weights} does not fit OpenCLIP's {name}: "
            f"{' '.join(str(error).split())[:400]}; give the weights of this model."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back OpenCLIP's log lines, which repeat our errors and set up the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
