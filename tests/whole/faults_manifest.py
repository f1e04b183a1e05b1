"""Faults of packed folders: shards that are not what their manifest says, and settings to match."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmscale.data.manifest import sealed
from tests.whole.damage import Place
from tests.whole.faults_shards import Fault

SHARD = "train-000000.tar"
NONE = ("verify", 0, ())


def lie(
    name: str, change: Callable[[dict[str, Any]], object], verify: str, stream: str = ""
) -> Fault:
    """A manifest that was written to say something else of the first shard."""

    def make(place: Place) -> None:
        content = json.loads((place.folder / "manifest.json").read_text())
        change(content["shards"][0])
        (place.folder / "manifest.json").write_bytes(sealed(content))

    # What only a look at every sample can find is verify's to find.
    last = ("stream", 4, (stream,)) if stream else ("stream", 0, ())
    return Fault(name, make, (("verify", 4, (verify,)), last), packed=True)


def torn(name: str, content: bytes, word: str) -> Fault:
    """A manifest that is none."""
    steps = (("verify", 4, ("manifest.json", word)), ("stream", 4, ("manifest.json", word)))
    return Fault(
        name,
        lambda place: (place.folder / "manifest.json").write_bytes(content),
        steps,
        packed=True,
    )


def changed(
    name: str, make: Callable[[Place], object], verify: str, stream: str = "", **options: Any
) -> Fault:
    """A packed folder whose files are not as they were."""
    last = ("stream", 4, (stream,)) if stream else ("stream", 0, ())
    return Fault(name, make, (("verify", 4, (verify,)), last), packed=True, **options)


def setting(name: str, where: str, code: int, *words: str) -> Fault:
    """A value of data.train that leads nowhere."""
    steps = (("stream", code, words),)
    return Fault(name, lambda place: None, steps, packed=True, where=where)


def edit(place: Place, name: str, change: Callable[[bytearray], object]) -> None:
    content = bytearray((place.folder / name).read_bytes())
    change(content)
    (place.folder / name).write_bytes(content)


def cut(content: bytearray) -> None:
    del content[2048:]


def flip(content: bytearray) -> None:
    content[600] ^= 0xFF


def other_number(content: bytearray) -> None:
    """The id of an image, which training would believe."""
    place = content.index(b'"images": [') + 14
    content[place] ^= 1


def swap_captions(content: bytearray) -> None:
    swapped = content.replace(b"of a.jpg", b"of ?").replace(b"of b.jpg", b"of a.jpg")
    content[:] = swapped.replace(b"of ?", b"of b.jpg")


def in_place_of_shard(make: Callable[[Path], object]) -> Callable[[Place], object]:
    def replace(place: Place) -> None:
        (place.folder / SHARD).unlink()
        make(place.folder / SHARD)

    return replace


def set_field(field: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda shard: shard.update({field: value})


def shift(shard: dict[str, Any]) -> None:
    shard["offsets"][1] += 512


def foreign_ids(shard: dict[str, Any]) -> None:
    shard["identities"]["images"][0] += 1


FAULTS = [
    changed("a cut shard", lambda p: edit(p, SHARD, cut), "has 2048 bytes", "its manifest says"),
    changed(
        "a grown shard", lambda p: edit(p, SHARD, lambda c: c.extend(bytes(512))), "bytes", SHARD
    ),
    changed("a flipped byte", lambda p: edit(p, SHARD, flip), "sha256 is", keys=frozenset("abcd")),
    changed("swapped captions", lambda p: edit(p, SHARD, swap_captions), "sha256 is"),
    changed(
        "a missing shard",
        lambda p: (p.folder / SHARD).unlink(),
        f"{SHARD}: is missing",
        f"{SHARD}: the manifest lists it but",
    ),
    changed(
        "a shard too many",
        lambda p: (p.folder / "other.tar").write_bytes(bytes(10240)),
        "other.tar: is not in manifest.json",
    ),
    changed("a folder for a shard", in_place_of_shard(Path.mkdir), "not a file", SHARD),
    changed("a pipe for a shard", in_place_of_shard(os.mkfifo), "not a file", SHARD),
    changed(
        "a device for a shard",
        in_place_of_shard(lambda path: path.symlink_to("/dev/zero")),
        "not a file",
        SHARD,
    ),
    changed(
        "a link to itself for a shard",
        in_place_of_shard(lambda path: path.symlink_to(path)),
        "not a file",
        SHARD,
    ),
    lie("a wrong sha256", set_field("sha256", "0" * 64), "sha256 is"),
    lie("a sha256 that is none", set_field("sha256", "no"), "64 hex", "64 hex"),
    lie("wrong bytes", set_field("bytes", 10**6), "bytes, the manifest says", "its manifest says"),
    lie("a wrong number of samples", set_field("samples", 3), "2 offsets for 3", "2 offsets for 3"),
    lie("negative samples", set_field("samples", -1), "not a count", "not a count"),
    lie("endless samples", set_field("samples", 10**30), "not a count", "not a count"),
    Fault(
        "a place between samples",
        lie("", shift, "").make,
        (
            ("verify", 4, ("no sample begins at byte",)),
            ("stream", 0, (f"{SHARD} sample 1: not a tar member",)),
        ),
        keys=frozenset("acd"),
        packed=True,
    ),
    lie("places that fall", lambda s: s["offsets"].reverse(), "do not rise", "do not rise"),
    lie("a place behind the end", set_field("offsets", [0, 2**40]), "no tar block", "no tar block"),
    Fault(
        "too many captions",
        lie("", set_field("captions", [9, 1]), "").make,
        (
            ("verify", 4, ("the manifest says 9",)),
            ("stream", 0, ("captions: 1, its manifest says 9",)),
        ),
        keys=frozenset("bcd"),
        packed=True,
    ),
    lie("no captions", set_field("captions", [0, 1]), "has no caption", "has no caption"),
    lie("wrong identities", foreign_ids, "identities are not those"),
    lie("identities of others", set_field("identities", {}), "not a list", "not a list"),
    lie("samples left out", set_field("skipped", 5), "and 5 left out"),
    lie(
        "a name above the folder",
        set_field("name", "../x.tar"),
        "plain file name",
        "plain file name",
    ),
    lie("an absolute name", set_field("name", "/etc/passwd"), "plain file name", "plain file name"),
    lie("a name with NUL", set_field("name", "a\0.tar"), "plain file name", "plain file name"),
    lie("a shard twice", set_field("name", "train-000001.tar"), "a shard twice", "a shard twice"),
    changed(
        "a number changed in a manifest",
        lambda p: edit(p, "manifest.json", other_number),
        "its digest is another",
        "its digest is another",
    ),
    torn("half a manifest", b'{"format": "mmscale-manifest", "version": 1, "sha', "as JSON"),
    torn("an empty manifest", b"", "as JSON"),
    torn("a manifest 100,000 levels deep", b"[" * 10**5, "as JSON"),
    torn("a manifest that is a list", b"[]", "is not a manifest"),
    torn(
        "a manifest of another version",
        b'{"format": "mmscale-manifest", "version": 9}',
        "version 9",
    ),
    torn("a manifest of one huge number", b"9" * 10**6, "as JSON"),
    torn("a manifest that is not UTF-8", b'{"format": "\xff"}', "as JSON"),
    changed(
        "a pipe for a manifest",
        lambda p: ((p.folder / "manifest.json").unlink(), os.mkfifo(p.folder / "manifest.json")),
        "not a file",
        "not a file",
    ),
    changed(
        "a folder for a manifest",
        lambda p: ((p.folder / "manifest.json").unlink(), (p.folder / "manifest.json").mkdir()),
        "not a file",
        "not a file",
    ),
    setting("a brace range of a billion", "x-{000000000..999999999}.tar", 4, "1,000,000 shards"),
    setting("braces in braces", "x" + "{a,b}" * 60 + ".tar", 4, "1,000,000 shards"),
    setting("braces that do not match", "x-{0..9.tar", 4, "its braces do not match"),
    setting("a glob without a match", "nowhere/*.tar", 4, "no shard matches"),
    setting("a command", "pipe:touch canary", 2, "data.allow_pipe"),
]
