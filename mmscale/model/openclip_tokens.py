"""OpenCLIP's tokenizers as callables that give ids without padding."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip
from open_clip.model import CLIPTextCfg
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

from mmscale.model.hf_tokens import require_size, require_vocabulary
from mmscale.model.hub import hub_call


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
