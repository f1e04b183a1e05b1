"""What the members of one sample say: its image, its captions, whose image it is.

Manifests and readers ask here, so that they agree about every shard, also about one made elsewhere,
whose json may hold neither captions nor an id.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any, TypeGuard

from mmscale.data.caption_text import (
    CAPTION_NAMES,
    MOST_CAPTIONS,
    captions_in,
    lines_of,
    listed,
    named_captions,
)
from mmscale.data.choice import USUAL, Choice
from mmscale.data.damage import DamagedSampleError, tell_once
from mmscale.data.tar import IMAGE_SUFFIXES, TEXT_BYTES, TarSample

# No tower reads as much. Tokenizers take a time quadratic in the length of a word.
_CAPTION_CHARACTERS, _WORD_CHARACTERS = 20_000, 2_000


@dataclass(frozen=True)
class Sample:
    """One image, undecoded, and what its text and json say.

    Attributes:
        key: Its name.
        image: The encoded image; empty without one.
        captions: Those of the json, else of the text; none where one is empty or not a text.
        image_id: That of the json, else one made from its source and the key.
        label: Class, a number or a name; None without one.
        group: The user's group; None without one.
        source: What the json calls the set in which its id counts; None where the id was made.
        lines: Lines of the text where the captions are the text's and it is no list; else 0.
        fault: What makes it useless, short of decoding its image; None where nothing does.
        shares: Of each place that its captions are from, how many are, and how often a turn draws
            from it, against the others; none where they are from one.
    """

    key: str
    image: bytes
    captions: tuple[str, ...]
    image_id: int
    label: int | str | None = None
    group: int | str | None = None
    source: str | None = None
    lines: int = 0
    fault: str | None = None
    shares: tuple[tuple[int, float], ...] = ()

    @property
    def class_number(self) -> int:
        """Its class if that is a number, else -1: names are numbered where a manifest is made."""
        return self.label if isinstance(self.label, int) else -1


def describe_members(
    found: TarSample, counted: int | None = None, choice: Choice = USUAL
) -> Sample:
    """What a sample of a tar holds.

    Args:
        found: Its members.
        counted: How many captions its manifest counted. A text of so many lines is read line by
            line, which only a look at the whole shard can decide; any other is one caption.
        choice: Which members are what.
    """
    members = found.members
    text, description = (_text(members, suffix) for suffix in ("txt", "json"))
    parsed = {} if description is None else _parse(description)
    fields = parsed or {}
    shares: tuple[tuple[int, float], ...] = ()
    if choice.texts or choice.fields:
        captions, fault, shares = _chosen(members, fields, choice)
        lines = 0
    else:
        captions, fault, lines = _captions(fields, text, counted)
    if parsed is None:
        fault = "has a json that is not an object"
    elif not _is_unicode(found.key):
        fault = "has a name that is not UTF-8"
    own, source = fields.get("image_id"), str(fields.get("source", ""))
    is_own = _is_id(own)
    image_id = own if _is_id(own) else image_id_of(source, found.key)
    return Sample(
        found.key,
        choice.image_of(found),
        captions,
        image_id,
        _number_or_name(fields.get("label")),
        _number_or_name(fields.get("group")),
        source if is_own else None,
        lines,
        unfit(found, choice) or fault,
        shares if len(shares) > 1 else (),
    )


def unfit(found: TarSample, choice: Choice = USUAL) -> str | None:
    """What is wrong with the members of a sample, whatever they say."""
    if choice.keys.image and not choice.image_of(found):
        ends = ", ".join(found.suffixes)[:200]
        return f"has no image: its members end in {ends}, not in {', '.join(choice.images)}"
    if not choice.keys.image and not any(name in found.members for name in IMAGE_SUFFIXES):
        dotted = next((s for s in found.suffixes if s.rpartition(".")[2] in IMAGE_SUFFIXES), None)
        if dotted and "." in dotted:
            return (
                f"has no image: keys end at the first dot of a name, so that `{dotted}` is taken "
                "for an ending; leave no dot in names but the last"
            )
        others = [f"`{suffix}`" for suffix in found.suffixes if suffix not in ("txt", "json")]
        if not others:
            return "has no image"
        ends = ", ".join(others)[:200]
        return f"has no image: if {ends} is one, index with --keys 'image: [...]'"
    if len(set(found.suffixes)) < len(found.suffixes):
        return "has a member twice"
    return None


def sample_of(
    found: TarSample, where: str, counted: int | None = None, choice: Choice = USUAL
) -> Sample:
    """A sample that can be used, short of decoding its image.

    Args:
        found: Its members.
        where: Names its shard in messages.
        counted: As in `describe_members`.
        choice: As there.

    Raises:
        DamagedSampleError: It cannot be used.
    """
    sample = describe_members(found, counted, choice)
    if sample.fault:
        raise DamagedSampleError(f"{where} {sample.key}: {sample.fault}")
    if counted is None and sample.lines > 1:
        tell_once(
            "lines",
            f"{where} {sample.key}: its txt has several lines and is one caption; a manifest "
            "(mmscale index) lets each line be one",
        )
    return sample


def image_id_of(source: str, key: str) -> int:
    """A 63-bit identity for an image whose source gives none."""
    # Names of members need not be Unicode.
    name = f"{source}/{key}".encode(errors="surrogatepass")
    digest = hashlib.blake2b(name, digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _is_id(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _number_or_name(value: Any) -> int | str | None:
    return value if _is_id(value) or (isinstance(value, str) and value.strip()) else None


def _text(members: dict[str, bytes], suffix: str) -> bytes | None:
    content = members.get(suffix)
    return content if content is not None and len(content) <= TEXT_BYTES else None


def _parse(description: bytes) -> dict[str, Any] | None:
    try:
        fields = json.loads(description)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def _captions(
    fields: dict[str, Any], text: bytes | None, counted: int | None
) -> tuple[tuple[str, ...], str | None, int]:
    """The captions, or none and what is wrong with one of them; lines of the text they are."""
    named = named_captions(fields)
    # One caption beside a text is that text again, or says less than it.
    if text is None or len(named) > 1 or captions_in(fields.get("captions")):
        return *_sound(named, fields), 0
    try:
        words = text.decode().removeprefix("\ufeff")
    except UnicodeDecodeError:
        return (), "has a caption that is not UTF-8", 0
    if found := listed(words):
        return *_sound(found, fields), 0
    lines = lines_of(words)
    by_line = len(lines) > 1 and len(lines) == counted
    return *_sound(lines if by_line else [words], fields), len(lines)


def _chosen(
    members: dict[str, bytes], fields: dict[str, Any], choice: Choice
) -> tuple[tuple[str, ...], str | None, tuple[tuple[int, float], ...]]:
    """The captions of the chosen places, or none and what is wrong with one; each place's share."""
    captions: list[Any] = []
    shares = []
    for name, share, is_text in (
        *((name, share, True) for name, share in choice.texts),
        *((name, share, False) for name, share in choice.fields),
    ):
        try:
            words = (_text(members, name) or b"").decode().removeprefix("\ufeff") if is_text else ""
        except UnicodeDecodeError:
            return (), "has a caption that is not UTF-8", ()
        found = captions_in(words if is_text else fields.get(name))
        if choice.keys.lines:
            parts = (lines_of(text) if _is_text(text) else [text] for text in found)
            found = [line for part in parts for line in part]
        found = [text for text in found if not _is_text(text) or text.strip()]
        if found:
            captions += found
            shares.append((len(found), share))
    if not captions:
        names = ", ".join(name for name, _ in (*choice.texts, *choice.fields))
        there = ", ".join([*members, *(f"json {name}" for name in map(str, fields))])[:200]
        return (), f"has no caption in {names}: it has {there}", ()
    return *_sound(captions, fields), tuple(shares)


def _is_text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str)


def _sound(captions: list[Any], fields: dict[str, Any]) -> tuple[tuple[str, ...], str | None]:
    if not captions:
        return (), f"has an empty caption or none{_known_instead(fields)}"
    if len(captions) > MOST_CAPTIONS:
        return (), f"has more than {MOST_CAPTIONS} captions"
    for caption in captions:
        if not isinstance(caption, str) or not caption.strip():
            return (), "has an empty caption or none"
        if length := too_long(caption):
            return (), f"has a caption with {length}"
        if not _is_unicode(caption):
            return (), "has a caption that is not Unicode"
    return tuple(captions), None


def _known_instead(fields: dict[str, Any]) -> str:
    if not fields:
        return ""
    names = ", ".join(map(str, fields))[:200]
    return (
        f": its json has {names}; name it {', '.join(CAPTION_NAMES)}, or index with --keys "
        "'json: [...]'"
    )


def _is_unicode(text: str) -> bool:
    """Whether it holds no lone surrogates, at which tokenizers and digests fail."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def too_long(caption: str) -> str | None:
    """What of a caption is longer than any tower reads."""
    if len(caption) > _CAPTION_CHARACTERS:
        return f"{len(caption):,} characters, more than {_CAPTION_CHARACTERS:,}"
    if len(caption) <= _WORD_CHARACTERS:
        return None
    longest = max(map(len, caption.split()), default=0)
    if longest > _WORD_CHARACTERS:
        return f"a word of {longest:,} characters, more than {_WORD_CHARACTERS:,}"
    return None
