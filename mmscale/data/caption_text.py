"""Captions on their way to the tokenizer: cleaned by name, and counted where they are cut."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from mmscale.contracts import InputSpec

Tokenize = Callable[[Sequence[str]], list[list[int]]]


class CleanedTokenize:
    """A tokenizer behind one of OpenCLIP's cleanings; picklable.

    `whitespace` mends wrongly decoded text and HTML entities and collapses blanks; `lower` also
    makes it lower case; `canonicalize` also drops punctuation.
    """

    def __init__(self, tokenize: Tokenize, cleaning: str):
        self.tokenize = tokenize
        self.cleaning = cleaning

    @property
    def tokenizer(self) -> Any:
        """The library's tokenizer behind the cleaning."""
        return getattr(self.tokenize, "tokenizer", None)

    def __call__(self, captions: Sequence[str]) -> list[list[int]]:
        # Imported here: OpenCLIP takes a second to load, and few runs clean.
        from open_clip.tokenizer import get_clean_fn

        clean = get_clean_fn(self.cleaning)
        return self.tokenize([clean(caption) for caption in captions])


def with_cleaning(spec: InputSpec, cleaning: str) -> InputSpec:
    """The same input, its captions cleaned as `data.caption_cleaning` says."""
    if cleaning == "none":
        return spec
    return replace(spec, tokenize=CleanedTokenize(spec.tokenize, cleaning))


def are_cut(spec: InputSpec, captions: Sequence[str], tokens: Sequence[list[int]]) -> list[bool]:
    """Which captions have more tokens than the tower takes.

    Only full rows can be cut ones; whether they are is counted word by word, as tokenizers that
    split at blanks count.
    """
    return [
        len(row) >= spec.context_length and _length(spec, caption) > spec.context_length
        for caption, row in zip(captions, tokens, strict=True)
    ]


def _length(spec: InputSpec, caption: str) -> int:
    """Tokens of a caption, those around it included, if nothing were cut."""
    around = len(spec.tokenize([""])[0])
    return around + sum(len(row) - around for row in spec.tokenize(caption.split() or [""]))
