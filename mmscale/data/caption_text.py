"""Captions as text: several in one place read as data, cleaned by name, counted where cut.

Nothing is evaluated: a list of texts as Python, pandas, numpy or PostgreSQL writes it is taken
apart by its quotes.
"""

import ast
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from mmscale.contracts import InputSpec, Peers, World
from mmscale.errors import ConfigError
from mmscale.parallel.peers import gather_objects

# Shares of the captions' tokens that stand for words which the tokenizer does not know: from the
# first on it is told, above the second the captions say next to nothing.
TOLD_UNKNOWN, MOST_UNKNOWN = 0.05, 0.9
Tokenize = Callable[[Sequence[str]], list[list[int]]]


def wording(caption: str) -> str:
    """What captions share that differ in case and spaces only."""
    return " ".join(caption.casefold().split())


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
        len(row) >= spec.context_length and token_count(spec, caption) > spec.context_length
        for caption, row in zip(captions, tokens, strict=True)
    ]


def token_count(spec: InputSpec, caption: str) -> int:
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
    everyone = gather_objects(peers, (sum(n for n, _ in mine), sum(n for _, n in mine)))
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


# Of one image, over all places. The longest lists of the field hold some fifty.
MOST_CAPTIONS = 500
# Names under which captions stand in json and in tables, best first.
CAPTION_NAMES = ("captions", "caption", "texts", "text", "sentences", "comment", "raw", "title",
                 "alt_text", "description")  # fmt: skip
# In an object that stands for one caption.
_INNER_NAMES = ("raw", "caption", "text")
_NUMBERED = re.compile(r"(?:captions?|texts?|sentences?)[_-]?(\d{1,6})")
_BRACKETS = {"[": "]", "(": ")", "{": "}"}
_QUOTED = r"""[uU]?(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_ITEM = re.compile(rf"\s*({_QUOTED})\s*(,?)", re.DOTALL)
_ARRAY = re.compile(r"array\((.*?)(?:,\s*dtype=[\w.<>' ]+)?\)", re.DOTALL)


def listed(text: str) -> list[str] | None:
    """The texts of a list that is written out; None for any other text.

    `["a", "b"]`, `['a', "b's"]`, `['a' 'b']` (numpy), `('a', 'b')`, `{"a","b"}`, and the same
    within `array(...)`.
    """
    text = text.strip()
    if text.startswith("array(") and (inner := _ARRAY.fullmatch(text)):
        text = inner[1].strip()
    if len(text) < 2 or _BRACKETS.get(text[0]) != text[-1]:
        return None
    if text[0] == "[":
        try:
            parsed = json.loads(text)
        except (ValueError, RecursionError):
            parsed = None
        if isinstance(parsed, list):
            return parsed if all(isinstance(item, str) for item in parsed) else None
    return _quoted_items(text[1:-1])


def _quoted_items(text: str) -> list[str] | None:
    items: list[str] = []
    place = 0
    while place < len(text):
        item = _ITEM.match(text, place)
        if item is None:
            return items if items and not text[place:].strip() else None
        try:
            # One quoted text, as the pattern found it.
            items.append(ast.literal_eval(item[1].replace("\n", "\\n").replace("\r", "\\r")))
        except (ValueError, SyntaxError):
            return None
        place = item.end()
    return items or None


def captions_in(value: Any) -> list[Any]:
    """What a json value holds as captions: a text, a list written as text, lists of any depth.

    What is not a text stays as it is, for the caller to name. At most one more than
    `MOST_CAPTIONS`.
    """
    if isinstance(value, str):
        return _enough(listed(value) or ([value] if value else []))
    return [] if value is None else _enough(_flat(value))


def _enough(items: Iterable[Any]) -> list[Any]:
    """As many as tell that there are too many."""
    return list(islice(items, MOST_CAPTIONS + 1))


def _flat(value: Any) -> Iterable[Any]:
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            waiting += reversed(item)
        elif isinstance(item, dict):
            yield next((item[name] for name in _INNER_NAMES if name in item), item)
        else:
            yield item


def lines_of(text: str) -> list[str]:
    """The lines that are not blank."""
    # Not `splitlines`, which also ends a line at separators that stand within captions.
    return [line.strip() for line in re.split(r"\r\n|\n|\r", text) if line.strip()]


def named_captions(fields: Mapping[str, Any]) -> list[Any]:
    """Captions under the best name that has some; none where no known name has any."""
    for name in CAPTION_NAMES:
        if found := captions_in(fields.get(name)):
            return found
    numbered = sorted(
        (int(match[1]), name)
        for name in fields
        if (match := _NUMBERED.fullmatch(name)) and fields[name]
    )
    return _enough(caption for _, name in numbered for caption in captions_in(fields[name]))
