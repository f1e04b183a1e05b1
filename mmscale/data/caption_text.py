"""Captions on their way to the tokenizer: cleaned by name, counted where cut or unknown."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from mmscale.contracts import InputSpec, Peers, World
from mmscale.errors import ConfigError
from mmscale.parallel.peers import from_all

# Shares of the captions' tokens that stand for words which the tokenizer does not know: from the
# first on it is told, above the second the captions say next to nothing.
TOLD_UNKNOWN, MOST_UNKNOWN = 0.05, 0.9
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


def unknown_words(
    spec: InputSpec, rows: Iterable[Sequence[int]], peers: Peers | World
) -> str | None:
    """What to tell of captions whose words the tokenizer does not know; None where it is little.

    Args:
        spec: What the text tower is fed.
        rows: Token ids of this rank's captions, without padding.
        peers: The ranks, which agree. Collective.

    Raises:
        ConfigError: Most tokens stand for unknown words.
    """
    if spec.unknown_token is None:
        return None
    around = len(spec.tokenize([""])[0])
    mine = [(list(row).count(spec.unknown_token), max(0, len(row) - around)) for row in rows]
    everyone = from_all(peers, (sum(n for n, _ in mine), sum(n for _, n in mine)))
    unknown, words = (sum(counts) for counts in zip(*everyone, strict=True))
    share = unknown / words if words else 0.0
    if share > MOST_UNKNOWN:
        raise ConfigError(
            f"model.text.name: its tokenizer knows none of the words behind {share:.0%} of the "
            f"captions' tokens; give a text tower of the captions' language, and with its own "
            f"tokenizer's files beside it."
        )
    if share < TOLD_UNKNOWN:
        return None
    return (
        f"{share:.0%} of the captions' tokens stand for words that the text tower's "
        "tokenizer does not know"
    )
