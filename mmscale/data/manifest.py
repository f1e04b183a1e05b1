"""The manifest of a packed folder: what its shards are, so that readers can seek and never guess.

`pack` and `index` write it, the stream and `verify` read it. It is read as untrusted data.
"""

import hashlib
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from dataclasses import field as dataclass_field
from functools import partial
from itertools import compress, pairwise
from pathlib import Path
from typing import Any, TypeGuard

from pydantic import ValidationError

from mmscale.config.data import KeysConfig
from mmscale.data.grouping import Identities, Trait, join
from mmscale.data.remote import safe_url
from mmscale.data.unread import Counts, Unread, load_json
from mmscale.errors import DataError
from mmscale.outputs import replace_file

MANIFEST_NAME = "manifest.json"
# Version 1 had no digest of its own.
_FORMAT, _VERSION = "mmscale-manifest", 2
# Version 3 counts members that its `keys` name.
_CHOSEN = 3
_READABLE = (1, 2, 3)
# How a manifest ends: with the digest of all that stands before.
_SEAL = b', "digest": "%s"}\n'
# 40 million samples; what is larger is no manifest, or more than a run's memory should hold.
MOST_BYTES = 2**31
_CHUNK = 2**24


@dataclass(frozen=True)
class Shard:
    """One tar.

    Attributes:
        name: File name in the manifest's folder.
        bytes: Size of the file.
        sha256: Digest of the file, hex.
        samples: Images in it.
        offsets: Byte offset of each sample's first tar header.
        captions: Captions of each sample.
        identities: Whose image each sample is; None in a manifest from before they were kept.
        skipped: Samples in the file that cannot be used and are not counted above.
    """

    name: str
    bytes: int
    sha256: str
    samples: int
    offsets: Counts
    captions: Counts
    identities: Identities | None = None
    skipped: int = 0

    def end_of(self, sample: int) -> int:
        """The byte after a sample's last."""
        return self.offsets[sample + 1] if sample + 1 < len(self.offsets) else self.bytes

    @property
    def sample_bytes(self) -> int:
        """Bytes that its samples take up."""
        return self.bytes

    def only(self, kept: Sequence[bool]) -> "Shard":
        """The same file with those of its samples alone that are `kept`."""
        identities = None if self.identities is None else self.identities.only(kept)
        return replace(
            self,
            samples=sum(kept),
            offsets=tuple(compress(self.offsets, kept)),
            captions=tuple(compress(self.captions, kept)),
            identities=identities,
        )


@dataclass(frozen=True)
class Manifest:
    """The shards of one folder, in their order.

    Attributes:
        split: Which split they hold; None for shards made elsewhere.
        source: Name of the data set.
        shards: The tars.
        settings: Digest of what `pack` was asked for; None for shards made elsewhere.
        classes: Names of the labels' numbers, where the labels had names.
        shards_in: Folder of the tars, where they do not lie beside the manifest.
        keys: Which members of a sample were counted.
        is_sealed: It was read, and holds a digest of itself, so that no bit in it has changed.
    """

    split: str | None
    source: str
    shards: tuple[Shard, ...]
    settings: str | None = None
    classes: tuple[str, ...] = ()
    shards_in: str | None = None
    keys: KeysConfig = dataclass_field(default_factory=KeysConfig)
    is_sealed: bool = dataclass_field(default=False, compare=False)

    @property
    def samples(self) -> int:
        """Images in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def captions(self) -> int:
        """Captions in all shards."""
        return sum(sum(shard.captions) for shard in self.shards)

    @property
    def copies(self) -> int:
        """Images that have the bytes of another."""
        return sum(shard.identities.copies for shard in self.shards if shard.identities)

    def beside(self, folder: Path | str) -> Path | str:
        """Where the tars are of a manifest that lies in a folder.

        Raises:
            DataError: It names another for them, and lies elsewhere itself.
        """
        if self.shards_in is None:
            return folder
        if isinstance(folder, Path):
            return folder / self.shards_in
        raise DataError(
            f"{safe_url(folder)}: its manifest names the folder {self.shards_in} for its shards; "
            "one that is fetched must lie beside them"
        )

    @property
    def digest(self) -> str:
        """Digest of the shards' digests, hex: changes when any byte of any shard does."""
        return hashlib.sha256("\n".join(shard.sha256 for shard in self.shards).encode()).hexdigest()


def read_manifest(folder: Path, *, lazily: bool = False) -> Manifest:
    """The manifest of a folder, checked; `lazily` as in `parse_manifest`.

    Raises:
        DataError: It is missing, unreadable or contradicts itself.
    """
    path = Path(folder) / MANIFEST_NAME
    try:
        if path.exists() and not path.is_file():
            # A pipe in its place would never be opened.
            raise _malformed(path, "is not a file")
        with path.open("rb") as file:
            content = joined(path, iter(partial(file.read, _CHUNK), b""))
    except FileNotFoundError as error:
        raise DataError(
            f"{folder}: has no {MANIFEST_NAME}; write it with `mmscale index {folder}/*.tar`, "
            "or finish `mmscale pack`"
        ) from error
    except OSError as error:
        raise _malformed(path, f"cannot be read ({error})") from error
    return parse_manifest(path, content, lazily=lazily)


def joined(path: Path | str, chunks: Iterable[bytes]) -> bytes:
    """A manifest's bytes, which end before they fill the memory.

    Raises:
        DataError: They do not.
    """
    content = bytearray()
    for chunk in chunks:
        content += chunk
        if len(content) > MOST_BYTES:
            raise DataError(
                f"{path}: more than {MOST_BYTES:,} bytes, which no manifest has; write it again "
                "with `mmscale index SHARDS...`, or split the folder"
            )
    return bytes(content)


def parse_manifest(path: Path | str, content: bytes, *, lazily: bool = False) -> Manifest:
    """A manifest from the bytes that `path`, a file or an address, holds.

    Args:
        path: For messages.
        content: The bytes.
        lazily: Read and check a shard's long lists only where they are looked into.

    Raises:
        DataError: They are not JSON, or contradict themselves.
    """
    try:
        parsed = load_json(content) if lazily else json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _malformed(path, f"cannot be read as JSON ({error})") from error
    manifest = _parse(path, parsed)
    if parsed["version"] > 1 and not _is_sealed(content):
        raise _malformed(path, "is not as it was written: its digest is another")
    return replace(manifest, is_sealed=parsed["version"] > 1)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a folder's manifest in one step: readers see the old one or the new one."""
    replace_file(Path(folder) / MANIFEST_NAME, written(manifest))


def written(manifest: Manifest) -> bytes:
    """A manifest as its file holds it."""
    apart = ("is_sealed", "keys")
    fields = {name: value for name, value in asdict(manifest).items() if name not in apart}
    if manifest.keys == KeysConfig():
        return sealed({"format": _FORMAT, "version": _VERSION, **fields})
    # Whoever knows no choice must not read it.
    keys = manifest.keys.model_dump(mode="json")
    return sealed({"format": _FORMAT, "version": _CHOSEN, "keys": keys, **fields})


def sealed(content: dict[str, Any]) -> bytes:
    """A manifest as it is written, with its digest at the end."""
    body = json.dumps({k: v for k, v in content.items() if k != "digest"}).encode()[:-1]
    return body + _SEAL % hashlib.sha256(body).hexdigest().encode()


def _is_sealed(content: bytes) -> bool:
    length = len(_SEAL % bytes(64))
    body, seal = memoryview(content)[:-length], content[-length:]
    return seal == _SEAL % hashlib.sha256(body).hexdigest().encode()


def with_identities(
    shards: Sequence[Shard], traits: Sequence[Sequence[Trait]]
) -> tuple[tuple[Shard, ...], tuple[str, ...]]:
    """A folder's shards with what all samples' traits together make of each, and class names."""
    joined, names = join(traits)
    return tuple(replace(s, identities=i) for s, i in zip(shards, joined, strict=True)), names


def _malformed(path: Path | str, fault: str) -> DataError:
    return DataError(f"{path}: {fault}; write it again with `mmscale index SHARDS...`")


def _parse(path: Path | str, content: Any) -> Manifest:
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise _malformed(path, f'is not a manifest (no "format": "{_FORMAT}")')
    version = content.get("version")
    if version not in _READABLE or isinstance(version, bool):
        raise _malformed(path, f"has version {version!r}, not {_VERSION}")
    split, source, settings, shards_in = (
        content.get(name) for name in ("split", "source", "settings", "shards_in")
    )
    if not isinstance(source, str):
        raise _malformed(path, f"source={source!r} is not a text")
    for name, value in (("split", split), ("settings", settings), ("shards_in", shards_in)):
        if value is not None and not isinstance(value, str):
            raise _malformed(path, f"{name}={value!r} is neither null nor a text")
    entries = content.get("shards")
    if not isinstance(entries, list) or not entries:
        raise _malformed(path, "lists no shards")
    shards = tuple(parse_shard(path, place, entry) for place, entry in enumerate(entries))
    if len({shard.name for shard in shards}) < len(shards):
        raise _malformed(path, "lists a shard twice")
    classes = content.get("classes", [])
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise _malformed(path, "classes is not a list of names")
    try:
        keys = KeysConfig.model_validate(content.get("keys", {}))
    except ValidationError as error:
        fault = f"keys names no members ({error.errors()[0]['msg']})"
        raise _malformed(path, fault) from error
    return Manifest(split, source, shards, settings, tuple(classes), shards_in, keys)


def parse_shard(path: Path | str, place: int, entry: Any) -> Shard:
    """A shard's record out of JSON that `path` holds.

    Raises:
        DataError: It contradicts itself.
    """
    where = f"shard {place}"
    if not isinstance(entry, dict):
        raise _malformed(path, f"{where} is not an object")
    name = entry.get("name")
    if not isinstance(name, str) or not _is_plain(name):
        raise _malformed(path, f"{where}: name={name!r} is not a plain file name")
    where = f"shard {name}"
    digest = entry.get("sha256")
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise _malformed(path, f"{where}: sha256={digest!r} is not 64 hex digits")
    size, samples = (_count(path, where, entry, field) for field in ("bytes", "samples"))
    offsets, captions = (_counts(path, where, entry, field) for field in ("offsets", "captions"))
    for field, values in (("offsets", offsets), ("captions", captions)):
        if len(values) != samples:
            raise _malformed(path, f"{where}: {len(values)} {field} for {samples} samples")
    offsets = _with(offsets, partial(_rising, path, where, size))
    captions = _with(captions, partial(_positive, path, where))
    identities = _identities(path, where, entry.get("identities"), samples)
    skipped = _count(path, where, {"skipped": 0, **entry}, "skipped")
    return Shard(name, size, digest, samples, offsets, captions, identities, skipped)


def _identities(path: Path | str, where: str, entry: Any, samples: int) -> Identities | None:
    if entry is None:
        return None
    if not isinstance(entry, dict):
        raise _malformed(path, f"{where}: identities is not an object")
    images, captions = (_counts(path, where, entry, name) for name in ("images", "captions"))
    groups = None if entry.get("groups") is None else _counts(path, where, entry, "groups")
    labels = None if entry.get("labels") is None else _counts(path, where, entry, "labels", -1)
    for values in (images, captions, groups, labels):
        if values is not None and len(values) != samples:
            raise _malformed(path, f"{where}: {len(values)} identities for {samples} samples")
    copies = _count(path, where, {"copies": 0, **entry}, "copies")
    return Identities(images, captions, groups, labels, copies)


def _is_plain(name: str) -> bool:
    return bool(name) and not name.startswith(".") and not set(name) & {"/", "\\", "\0"}


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _count(path: Path | str, where: str, entry: dict[str, Any], field: str) -> int:
    value = entry.get(field)
    if not _is_count(value):
        raise _malformed(path, f"{where}: {field}={value!r} is not a count")
    return value


def _with(values: Any, check: Callable[[Any], tuple[int, ...]]) -> Counts:
    """The values, checked now, or when they are read."""
    if not isinstance(values, Unread):
        return check(values)
    values.check = check
    return values


def _rising(path: Path | str, where: str, size: int, values: Any) -> tuple[int, ...]:
    offsets = _sound(path, where, "offsets", 0, values)
    if any(offset % tarfile.BLOCKSIZE or offset >= size for offset in offsets):
        raise _malformed(path, f"{where}: an offset is no tar block of its {size} bytes")
    if any(after <= before for before, after in pairwise(offsets)):
        raise _malformed(path, f"{where}: its offsets do not rise")
    return offsets


def _positive(path: Path | str, where: str, values: Any) -> tuple[int, ...]:
    captions = _sound(path, where, "captions", 0, values)
    if 0 in captions:
        raise _malformed(path, f"{where}: sample {captions.index(0)} has no caption")
    return captions


def _counts(
    path: Path | str, where: str, entry: dict[str, Any], field: str, least: int = 0
) -> Counts:
    values: Any = entry.get(field)
    return _with(values, partial(_sound, path, where, field, least))


def _sound(path: Path | str, where: str, field: str, least: int, values: Any) -> tuple[int, ...]:
    if isinstance(values, tuple):
        return values
    # Millions of them: looked at without a step of Python for each.
    counts = values if isinstance(values, list) and set(map(type, values)) <= {int} else [-(2**63)]
    if not least <= min(counts, default=least) <= max(counts, default=least) < 2**63:
        raise _malformed(path, f"{where}: {field} is not a list of counts")
    return tuple(values)
