"""Towers of OpenCLIP configs, alone: `openclip:NAME` with `options` over the config's own keys.

Each ends in its pooled feature: OpenCLIP's output projection is left out, because the model's own
head takes its place. `model.preset=openclip:NAME` keeps the projections (`openclip_preset.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from open_clip.factory import get_model_config
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, _build_text_tower, _build_vision_tower
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transformer import TextTransformer, Transformer, VisionTransformer
from torch import Tensor, nn

from mmscale.config.model import TextConfig, TowerConfig, VisionConfig
from mmscale.errors import ConfigError
from mmscale.model.freezing import chain
from mmscale.model.hf_models import checkpoint_hf
from mmscale.model.hf_text import require_size, require_vocabulary
from mmscale.model.hub import hub_call
from mmscale.model.inputs import (
    ImageInput,
    TextInput,
    agreed_context,
    agreed_size,
    at_size,
    triple,
)
from mmscale.model.openclip_folder import is_on_hub, require_own_parts
from mmscale.model.sources import check_options, constructing, did_you_mean
from mmscale.model.stretched import stretch_openclip
from mmscale.model.timm_vision import (
    as_sequence,
    checkpoint_timm,
    show_features,
    timm_blocks,
)
from mmscale.model.tower import Tower, look
from mmscale.model.weights import load_strictly, read_weights

# Names of a text tower in a whole CLIP's weights, where nothing stands in front of them.
TEXT_PARTS = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "cls_emb")
PROJECTIONS = ("proj", "text_projection")


class OpenClipVision(Tower):
    """An OpenCLIP image tower."""

    def __init__(self, trunk: Any, image_size: int):
        super().__init__(trunk)
        if isinstance(trunk, VisionTransformer):
            trunk.output_tokens = True
        if isinstance(trunk, TimmModel):
            show_features(trunk.trunk)
        look(self, torch.zeros(1, 3, image_size, image_size))

    def forward_sequence(
        self, pixels: Float[Tensor, "b c h w"]
    ) -> tuple[Float[Tensor, "b f"], Float[Tensor, "b s e"]]:
        if isinstance(self.trunk, TimmModel):
            pooled, sequence = self.trunk.trunk(pixels)
            return self.trunk.head(pooled), sequence
        if isinstance(self.trunk, ModifiedResNet):
            outputs = self.trunk.forward_intermediates(pixels, indices=[4])
            return outputs["image_features"], as_sequence(outputs["image_intermediates"][0], "NCHW")
        return self.trunk(pixels)

    def checkpoint_blocks(self) -> bool:
        if isinstance(self.trunk, TimmModel):
            return checkpoint_timm(self.trunk.trunk)
        return _checkpoint(self.trunk)

    def block_parameters(self) -> list[list[str]]:
        if not isinstance(self.trunk, TimmModel):
            return chain(self.trunk, PROJECTIONS)
        groups = [[f"trunk.{name}" for name in group] for group in timm_blocks(self.trunk.trunk)]
        groups[-1] += [f"head.{name}" for name, _ in self.trunk.head.named_parameters()]
        return groups


class OpenClipText(Tower):
    """An OpenCLIP text tower that takes rows trimmed to their longest caption.

    Causal towers pooled at the end token see no padding, so trimming is exact. Those that attend to
    padding, or append a token, get their rows padded back to the whole context.
    """

    def __init__(self, trunk: Any, pad_token: int):
        super().__init__(trunk)
        self.pad_token = pad_token
        self.whole_rows = 0
        trunk.output_tokens = True
        if isinstance(trunk, TextTransformer):
            trunk.transformer.register_forward_pre_hook(_slice_mask, with_kwargs=True)
            for module in trunk.transformer.modules():
                if isinstance(module, nn.MultiheadAttention):
                    module.register_forward_pre_hook(say_causal, with_kwargs=True)
            at_end = trunk.pool_type in ("argmax", "eos") and trunk.cls_emb is None
            if trunk.attn_mask is None or not at_end:
                self.whole_rows = trunk.context_length
        tokens = torch.ones(1, 2, dtype=torch.int64)
        look(self, tokens, torch.ones_like(tokens, dtype=torch.bool))

    def forward_sequence(
        self, tokens: Int64[Tensor, "b t"], mask: Bool[Tensor, "b t"]
    ) -> tuple[Float[Tensor, "b f"], Float[Tensor, "b t e"]]:
        if isinstance(self.trunk, HFTextEncoder):
            return self._whole_sequence(tokens)
        length = tokens.shape[1]
        missing = max(self.whole_rows - length, 0)
        pooled, sequence = self.trunk(F.pad(tokens, (0, missing), value=self.pad_token))
        return pooled, sequence[:, :length]

    def _whole_sequence(
        self, tokens: Int64[Tensor, "b t"]
    ) -> tuple[Float[Tensor, "b f"], Float[Tensor, "b t e"]]:
        """As the trunk's own forward, which leaves out the token that it pools."""
        trunk: Any = self.trunk
        real = (tokens != trunk.config.pad_token_id).long()
        output = trunk.transformer(input_ids=tokens, attention_mask=real)
        return trunk.proj(trunk.pooler(output, real)), output.last_hidden_state

    def checkpoint_blocks(self) -> bool:
        if isinstance(self.trunk, HFTextEncoder):
            return checkpoint_hf(self.trunk.transformer)
        return _checkpoint(self.trunk)

    def block_parameters(self) -> list[list[str]]:
        return chain(self.trunk, PROJECTIONS)


def build_openclip_vision(
    name: str, config: VisionConfig, image_size: int | None
) -> tuple[Tower, ImageInput]:
    """The image tower of an OpenCLIP config; `options` are keys of its `vision_cfg`."""
    key = "model.vision"
    require_own_pooling(config, key, name)
    whole = openclip_config(name, f"{key}.name")
    if other := whole["vision_cfg"].get("timm_model_name"):
        raise ConfigError(f"the image tower of {name} is timm's: set {key}.name=timm:{other}.")
    size = agreed_size(image_size, dict(config.options), "image_size")
    settings = _settings(whole["vision_cfg"], config, CLIPVisionCfg, key, "timm_")
    if size:
        settings["image_size"] = size
    with constructing(key, f"openclip:{name}"):
        vision = CLIPVisionCfg(**settings)
        trunk = _build_vision_tower(whole["embed_dim"], vision, whole.get("quick_gelu", False))
    if isinstance(trunk, VisionTransformer):
        trunk.proj = None
    with at_size(size, whole["vision_cfg"].get("image_size"), f"openclip:{name}"):
        _fill(trunk, config, key, "visual.")
    pixels = openclip_pixels(vision.image_size)
    return OpenClipVision(trunk, pixels.image_size), pixels


def build_openclip_text(name: str, config: TextConfig) -> tuple[Tower, TextInput]:
    """The text tower of an OpenCLIP config; `options` are keys of its `text_cfg`."""
    key = "model.text"
    require_own_pooling(config, key, name)
    whole = openclip_config(name, f"{key}.name")
    if other := whole["text_cfg"].get("hf_model_name"):
        raise ConfigError(
            f"the text tower of {name} is Hugging Face's: set {key}.name=hf:{other}, or a folder."
        )
    settings = _settings(whole["text_cfg"], config, CLIPTextCfg, key, ("hf_", "tokenizer_"))
    with constructing(key, f"openclip:{name}"):
        text = CLIPTextCfg(**settings)
        trunk = _build_text_tower(whole["embed_dim"], text, whole.get("quick_gelu", False))
    trunk.text_projection = None
    _fill(trunk, config, key, "text.")
    asked = config.context_length
    settings["context_length"] = stretch_openclip(trunk, asked, text.context_length)
    tokens = openclip_tokens(name, config, {**whole["text_cfg"], **settings})
    return OpenClipText(trunk, tokens.pad_token), tokens


def openclip_config(name: str, setting: str) -> dict[str, Any]:
    """The configuration of an OpenCLIP model, to change at will.

    Raises:
        ConfigError: OpenCLIP has no model of this name, or its file asks for more than data.
    """
    what = f"{setting}=openclip:{name}"
    with hub_call(what, "give a name of open_clip.list_models()", remote=is_on_hub(name)):
        config = get_model_config(name)
    if config is None:
        raise ConfigError(
            f"{setting}=openclip:{name} is not a model of OpenCLIP"
            f"{did_you_mean(name, open_clip.list_models())}."
        )
    config = deepcopy(config)
    require_own_parts(config, name, what)
    return config


def openclip_pixels(
    size: int | tuple[int, int], facts: Mapping[str, Any] | None = None
) -> ImageInput:
    """The input of an OpenCLIP image tower: CLIP's preprocessing unless `facts` say otherwise.

    Raises:
        ConfigError: `facts` ask for another way of resizing than OpenCLIP has, or for a border of
            another colour than black.
    """
    facts = facts or {}
    resize = facts.get("resize_mode") or "shortest"
    if resize not in ("shortest", "longest", "squash"):
        raise ConfigError(
            f"preprocess_cfg of an OpenCLIP model: resize_mode={resize} is none of shortest, "
            f"longest and squash; set it to the one that the model was trained with."
        )
    if resize == "longest" and facts.get("fill_color"):
        raise ConfigError(
            f"preprocess_cfg of an OpenCLIP model: fill_color={facts['fill_color']}, but pictures "
            f"are surrounded with black only; set it to 0."
        )
    return ImageInput(
        image_size=size if isinstance(size, int) else size[0],
        mean=triple(facts.get("mean") or open_clip.OPENAI_DATASET_MEAN),
        std=triple(facts.get("std") or open_clip.OPENAI_DATASET_STD),
        interpolation=facts.get("interpolation") or "bicubic",
        resize=resize,
    )


def openclip_tokens(name: str, config: TextConfig, text: Mapping[str, Any]) -> TextInput:
    """The tokenizer of an OpenCLIP model, whose `text_cfg` is `text`."""
    longest = text.get("context_length", CLIPTextCfg.context_length)
    length = agreed_context(config.context_length, longest, f"openclip:{name}")
    tokenize, pad_token = read_tokenize(name, length, text)
    library = getattr(getattr(tokenize, "tokenizer", None), "tokenizer", None)
    return TextInput(tokenize, pad_token, length, getattr(library, "unk_token_id", None))


def _settings(
    own: Mapping[str, Any],
    config: TowerConfig,
    record: type,
    key: str,
    of_others: str | tuple[str, ...],
) -> dict[str, Any]:
    """The configuration's own keys under the user's, which may not name another library's part."""
    known = [option.name for option in fields(record) if not option.name.startswith(of_others)]
    check_options(config.options, known, key, str(config.name))
    return {name: value for name, value in {**own, **config.options}.items() if name in known}


def _fill(trunk: nn.Module, config: TowerConfig, key: str, prefix: str) -> None:
    """Load a file of the tower alone, or the tower's part of a whole CLIP's."""
    if config.weights == "random":
        return
    if config.weights == "pretrained":
        raise ConfigError(
            f"{key}.name={config.name} names an architecture without weights of its own: set "
            f"{key}.weights to a file or to random, or model.preset={config.name} with "
            f"model.weights set to one of OpenCLIP's tags."
        )
    tensors = read_weights(config.weights, f"{key}.weights")
    mine = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    if not mine and any(name.startswith("visual.") for name in tensors):
        mine = {name: tensor for name, tensor in tensors.items() if name.startswith(TEXT_PARTS)}
    load_strictly(trunk, mine or tensors, f"{key}.weights={config.weights}", spare=PROJECTIONS)


def _slice_mask(
    module: nn.Module, args: tuple[Any, ...], words: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Cut OpenCLIP's causal mask, made for the whole context, to the rows at hand."""
    mask = words.get("attn_mask")
    if mask is not None:
        length = args[0].shape[1]
        words = {**words, "attn_mask": mask[..., :length, :length]}
    return args, words


def say_causal(
    module: nn.Module, args: tuple[Any, ...], words: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Name a causal mask as such on an accelerator, where attention then needs none in memory."""
    mask = words.get("attn_mask")
    # A mask of three axes hides padding too.
    if mask is not None and mask.ndim == 2 and mask.device.type != "cpu":
        words = {**words, "is_causal": True}
    return args, words


def _checkpoint(trunk: nn.Module) -> bool:
    transformer = getattr(trunk, "transformer", None)
    if not isinstance(transformer, Transformer):
        return False
    transformer.grad_checkpointing = True
    return True


def require_own_pooling(config: VisionConfig | TextConfig, key: str, name: str) -> None:
    """Refuse a pooling from outside: OpenCLIP's towers carry theirs in their options."""
    if config.pooling != "auto":
        raise ConfigError(
            f"{key}.pooling={config.pooling}, but openclip:{name} pools by its own configuration; "
            f"set {key}.options.pool_type, or {key}.pooling=auto."
        )


class ClipTokenize:
    """CLIP's byte-pair tokens between start and end, cut as OpenCLIP cuts them; picklable."""

    def __init__(self, tokenizer: SimpleTokenizer, context_length: int):
        self.tokenizer = tokenizer
        self.context_length = context_length

    def __call__(self, captions: Sequence[str]) -> list[list[int]]:
        start, end = self.tokenizer.sot_token_id, self.tokenizer.eot_token_id
        room = self.context_length - 2
        return [[start, *self.tokenizer.encode(text)[:room], end] for text in captions]


class PaddedTokenize:
    """Any other OpenCLIP tokenizer, its padding taken off again; picklable."""

    def __init__(self, tokenizer: Any, pad_token: int):
        self.tokenizer = tokenizer
        self.pad_token = pad_token

    def __call__(self, captions: Sequence[str]) -> list[list[int]]:
        rows = self.tokenizer(list(captions))
        kept = ((rows != self.pad_token).cumsum(1).argmax(1) + 1).tolist()
        return [row[:length].tolist() for row, length in zip(rows, kept, strict=True)]


def read_tokenize(
    name: str, context_length: int, text: Mapping[str, Any]
) -> tuple[Callable[[Sequence[str]], list[list[int]]], int]:
    """The tokenizer of an OpenCLIP model with this `text_cfg`, and its padding token.

    Raises:
        ConfigError: It comes from the hub, which cannot be reached.
    """
    named = text.get("hf_tokenizer_name")
    remote = bool(named and not Path(named).is_dir()) or "siglip" in name.lower()
    with hub_call(f"the tokenizer of openclip:{name}", "put it into the local cache", remote):
        tokenizer = open_clip.get_tokenizer(name, context_length=context_length)
        if named and type(tokenizer) is HFTokenizer:
            require_vocabulary(named, tokenizer.tokenizer)
    if named and not text.get("hf_model_name"):
        require_size(named, tokenizer.tokenizer, text.get("vocab_size", CLIPTextCfg.vocab_size))
    if isinstance(tokenizer, SimpleTokenizer) and tokenizer.reduction_fn is None:
        return ClipTokenize(tokenizer, context_length), 0
    inner = getattr(tokenizer, "tokenizer", None)
    pad_token = getattr(inner, "pad_token_id", None) or 0
    return PaddedTokenize(tokenizer, pad_token), pad_token
