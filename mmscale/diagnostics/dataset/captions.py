"""Verdicts on captions: those of many images, those that are cut off, those in other scripts."""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import lru_cache

from mmscale.data.caption_text import wording
from mmscale.diagnostics.dataset.verdict import (
    MOST_EXAMPLES,
    DataVerdict,
    Looks,
    wilson,
)

# Captions of simple scenes coincide by chance; from so many images on, a caption is a template.
MANY_IMAGES = 10
TOLERATED_REPEATS = 0.05
TOLERATED_CUT = 0.01
# Names and signs in another script stand in captions of any language.
TOLERATED_SCRIPTS = 0.02
# Captions in Japanese mix three scripts.
_ONE_SCRIPT = {"HIRAGANA": "CJK", "KATAKANA": "CJK"}


def repeated_captions(looks: Looks) -> DataVerdict | None:
    """Captions of equal words, whatever their case and spaces, that many images have."""
    owners: dict[str, list[int]] = defaultdict(list)
    total = 0
    for row, captions in enumerate(looks.captions):
        total += len(captions)
        for words in {wording(caption) for caption in captions}:
            owners[words].append(row)
    # An image may say the same words twice, and counts once for them.
    many = {words: rows for words, rows in owners.items() if len(rows) >= MANY_IMAGES}
    count = sum(map(len, many.values()))
    if count <= TOLERATED_REPEATS * total:
        return None
    most = sorted(many, key=lambda words: -len(many[words]))
    return DataVerdict(
        "repeated_captions",
        count / total,
        wilson(count, total),
        total,
        f"{count:,} of {total:,} captions stand at {MANY_IMAGES} images or more each; the commonest"
        f" at {len(many[most[0]]):,}",
        "write captions that tell the images apart, or leave the template's captions out",
        tuple(looks.example(many[words][0], words) for words in most[:MOST_EXAMPLES]),
        {"wordings": float(len(many))},
    )


def cut_captions(
    looks: Looks, tokens: Callable[[str], int], context_length: int
) -> DataVerdict | None:
    """Captions of which a tower reads only the beginning.

    Args:
        looks: The set.
        tokens: How many tokens a caption has, marks of beginning and end included.
        context_length: Tokens that the tower takes.
    """
    total, cut = 0, []
    for row, captions in enumerate(looks.captions):
        total += len(captions)
        for caption in captions:
            # A token has a character at least, and two tokens are marks.
            if len(caption) > context_length - 2:
                length = tokens(caption)
                if length > context_length:
                    cut.append((length, row, caption))
    if len(cut) <= TOLERATED_CUT * total:
        return None
    cut.sort(key=lambda entry: (-entry[0], entry[1]))
    return DataVerdict(
        "cut_captions",
        len(cut) / total,
        wilson(len(cut), total),
        total,
        f"{len(cut):,} of {total:,} captions have more than {context_length} tokens; a text tower "
        "of that length does not see their ends",
        "take a tower of a longer context (model.text.context_length), or shorter captions",
        tuple(
            looks.example(row, f"{length} tokens: {caption[:200]}")
            for length, row, caption in cut[:MOST_EXAMPLES]
        ),
        {"longest": float(cut[0][0])},
    )


def language_mix(looks: Looks) -> DataVerdict | None:
    """Captions in another writing system than most; languages that share one are not told apart."""
    rows: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for row, captions in enumerate(looks.captions):
        for caption in captions:
            if script := script_of(caption):
                rows[script].append((row, caption))
    counts = Counter({script: len(found) for script, found in rows.items()})
    total = counts.total()
    if not total:
        return None
    main = counts.most_common(1)[0][0]
    minority = total - counts[main]
    if minority <= TOLERATED_SCRIPTS * total:
        return None
    shares = ", ".join(f"{name.title()} {n / total:.1%}" for name, n in counts.most_common(5))
    # An image once.
    others = {row: words for name, _ in counts.most_common()[1:] for row, words in rows[name]}
    return DataVerdict(
        "language_mix",
        minority / total,
        wilson(minority, total),
        total,
        f"{minority:,} of {total:,} captions are not in the writing system of the others: {shares}",
        "take a text tower and tokenizer of all these languages, or train on the captions of one",
        tuple(
            looks.example(row, caption[:200])
            for row, caption in list(others.items())[:MOST_EXAMPLES]
        ),
        {name.lower(): count / total for name, count in counts.items()},
    )


def script_of(caption: str) -> str | None:
    """The writing system of most of a caption's letters, as Unicode names it; None without any."""
    if caption.isascii():
        return "LATIN" if any(map(str.isalpha, caption)) else None
    scripts = Counter(filter(None, map(_script, caption)))
    return scripts.most_common(1)[0][0] if scripts else None


@lru_cache(maxsize=2**16)
def _script(letter: str) -> str | None:
    if not letter.isalpha():
        return None
    # A letter's name begins with that of its script, as in CYRILLIC SMALL LETTER A.
    first = unicodedata.name(letter, "").partition(" ")[0].partition("-")[0]
    return _ONE_SCRIPT.get(first, first) or None
