"""What the members of one sample say: its image, its captions, whose image it is.

Manifests (`verify`) and readers (`shards`) ask here, so that they agree about every shard, also
about one made elsewhere, whose json may hold neither captions nor an id.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# In order of preference, where a sample holds several.
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
# A caption or description longer than this is no caption.
TEXT_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Description:
    """What the text and json of a sample say.

    Attributes:
        captions: Those of the json, else the text; none where one is empty or not a text.
        image_id: That of the json, else one made from its source and the key.
        fault: What makes them useless, or None.
    """

    captions: tuple[str, ...]
    image_id: int
    fault: str | None


def image_of(members: Mapping[str, Any]) -> bytes | None:
    """The encoded image of a sample, given as the content of its members by ending."""
    return next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)


def describe_members(key: str, members: Mapping[str, Any]) -> Description:
    """Captions and identity of a sample, given as the content of its members by ending."""
    text, description = (_text(members, suffix) for suffix in ("txt", "json"))
    parsed = {} if description is None else _parse(description)
    fields = parsed or {}
    captions = _captions(fields.get("captions"), text)
    fault = None
    if parsed is None:
        fault = "has a json that is not an object"
    elif not captions:
        fault = "has an empty caption or none"
    image_id = fields.get("image_id")
    if not isinstance(image_id, int) or isinstance(image_id, bool) or not 0 <= image_id < 2**63:
        image_id = image_id_of(fields.get("source", ""), key)
    return Description(captions, image_id, fault)


def image_id_of(source: str, key: str) -> int:
    """A 63-bit identity for an image whose source gives none."""
    # Names of members need not be Unicode.
    name = f"{source}/{key}".encode(errors="surrogatepass")
    digest = hashlib.blake2b(name, digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _text(members: Mapping[str, Any], suffix: str) -> bytes | None:
    content = members.get(suffix)
    return content if content is not None and len(content) <= TEXT_BYTES else None


def _parse(description: bytes) -> dict[str, Any] | None:
    try:
        fields = json.loads(description)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def _captions(captions: Any, text: bytes | None) -> tuple[str, ...]:
    if not captions and text is not None:
        try:
            captions = [text.decode()]
        except UnicodeDecodeError:
            return ()
    if not isinstance(captions, list):
        return ()
    sound = all(isinstance(caption, str) and caption.strip() for caption in captions)
    return tuple(captions) if sound else ()
