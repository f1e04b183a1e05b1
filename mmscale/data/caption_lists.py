"""Several captions in one place: lists in JSON, in cells of tables and in texts, read as data.

Nothing is evaluated: a list of texts as Python, pandas, numpy or PostgreSQL writes it is taken
apart by its quotes.
"""

import ast
import json
import re
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

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
