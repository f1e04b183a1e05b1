"""Faults of shards: each with the verbs that meet it, how they end and what they say."""

import gzip
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from tests.whole.damage import (
    BLOCK,
    END,
    Place,
    animated,
    bomb,
    described,
    entry,
    gzip_bomb,
    pax,
    picture,
    png_header,
    sample,
    saved,
)

GOOD = frozenset("abcd")


@dataclass(frozen=True)
class Fault:
    """One kind of damage.

    Attributes:
        name: What it is.
        make: Makes it at a place.
        steps: Verbs in their order, each with its exit code and words that it must say.
        keys: What the stream must deliver, or a pack must hold; OUTSIDE is the folder beside.
        packed: It is made in a packed folder of the good samples.
        where: Another value of data.train, or a recipe in the folder.
    """

    name: str
    make: Callable[[Place], object]
    steps: tuple[tuple[str, int, tuple[str, ...]], ...]
    keys: frozenset[str] = GOOD
    packed: bool = False
    where: str | None = None


def foreign(
    name: str,
    damage: bytes | Callable[[Place], bytes],
    index: tuple[str, ...] = (),
    verify: tuple[str, ...] = (),
    stream: tuple[str, ...] = (),
    code: int = 0,
    extra: str = "",
) -> Fault:
    """A shard made elsewhere with damage between its good samples.

    Args:
        name: What it is.
        damage: Bytes between the samples `b` and `c`.
        index: What `mmscale index` says of it.
        verify: What `mmscale verify` says of it, which then ends with 4.
        stream: What the stream says of it.
        code: How index ends; unless 0, nothing can be streamed.
        extra: Keys that the damage itself delivers.
    """

    def make(place: Place) -> None:
        middle = damage(place) if callable(damage) else damage
        content = sample("a") + sample("b") + middle + sample("c") + sample("d") + END
        (place.folder / "x.tar").write_bytes(content)

    steps: list[tuple[str, int, tuple[str, ...]]] = [("index", code, index)]
    if code == 0:
        steps += [("verify", 4 if verify else 0, verify), ("stream", 0, stream)]
    return Fault(f"shard: {name}", make, tuple(steps), GOOD | frozenset(extra.split()))


def broken(name: str, code: str = "jpg", **members: bytes) -> Fault:
    """A sample whose image nobody can decode: found by verify and by the stream, not by index."""
    image = next(iter(members.values()))
    damage = sample("m", **{code: image})
    return foreign(name, damage, (), ("sample m cannot be decoded",), ("m: undecodable image",))


def lone(name: str, make: Callable[[Place], object], *words: str) -> Fault:
    """Something in place of a second shard."""

    return Fault(f"beside: {name}", beside_good(make), (("index", 4, ("y.tar", *words)),))


def beside_good(make: Callable[[Place], object]) -> Callable[[Place], object]:
    """The same beside a shard of the good samples."""

    def both(place: Place) -> None:
        (place.folder / "x.tar").write_bytes(b"".join(map(sample, sorted(GOOD))) + END)
        make(place)

    return both


def shard(content: bytes) -> Callable[[Place], object]:
    return lambda place: (place.folder / "y.tar").write_bytes(content)


def deep(levels: int) -> bytes:
    return b'{"captions": ' + b"[" * levels + b"]" * levels + b"}"


JPEG = picture(7, (300, 200))
FOREIGN = [
    foreign("a name above the folder", sample("../escape"), extra="../escape"),
    foreign(
        "an absolute name",
        lambda place: sample(f"{place.outside}/escape"),
        extra="OUTSIDE/escape",
    ),
    foreign(
        "a symbolic link",
        entry("m.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd") + entry("m.txt", b"x"),
        ("sample m has no image",),
    ),
    foreign(
        "a hard link",
        entry("m.jpg", kind=tarfile.LNKTYPE, link="a.jpg") + entry("m.txt", b"x"),
        ("sample m has no image",),
    ),
    foreign(
        "a character device",
        entry("m.jpg", kind=tarfile.CHRTYPE) + entry("m.txt", b"x"),
        ("sample m has no image",),
    ),
    foreign("a block device", entry("m.jpg", kind=tarfile.BLKTYPE)),
    foreign("a named pipe", entry("m.jpg", kind=tarfile.FIFOTYPE)),
    foreign("a folder with a sample's name", entry("m.jpg/", kind=tarfile.DIRTYPE)),
    foreign(
        "a pickle",
        lambda place: entry("m.pickle", bomb(place.canary)) + entry("m.txt", b"x"),
        ("sample m has no image",),
    ),
    foreign(
        "a pickle in a good sample", lambda place: sample("m", pyd=bomb(place.canary)), extra="m"
    ),
    foreign("a pth in a good sample", lambda place: sample("m", pth=bomb(place.canary)), extra="m"),
    foreign("a key that occurs twice", sample("a"), ("sample a its key occurs twice",)),
    foreign(
        "a member that occurs twice", sample("m") + entry("m.txt", b"x"), ("m has a member twice",)
    ),
    foreign(
        "members of two samples in turn",
        entry("m.jpg", JPEG) + entry("n.jpg", JPEG) + entry("m.txt", b"m") + entry("n.txt", b"n"),
        ("m has an empty caption or none", "n has an empty caption or none"),
    ),
    foreign("a caption alone", entry("m.txt", b"x"), ("sample m has no image",)),
    foreign("an image alone", entry("m.jpg", JPEG), ("m has an empty caption or none",)),
    foreign("an empty caption", sample("m", txt=b" \n"), ("m has an empty caption or none",)),
    foreign(
        "a caption that is not UTF-8", sample("m", txt=b"caf\xe9"), ("caption that is not UTF-8",)
    ),
    foreign("a caption of 1 MB", sample("m", txt=b"a dog " * 2**18), ("1,572,864 characters",)),
    foreign(
        "a word of 5,000 letters", sample("m", txt=b"ab" * 2500), ("a word of 5,000 characters",)
    ),
    foreign(
        "a text of 20 MB", sample("m", txt=bytes(20 * 2**20)), ("m has an empty caption or none",)
    ),
    foreign("NUL in a caption", sample("m", txt=b"a\0dog"), extra="m"),
    foreign("a script in a caption", sample("m", txt=b"<script>alert(1)</script>"), extra="m"),
    foreign("control characters in a caption", sample("m", txt=b"\x1b[2J\x07dog"), extra="m"),
    foreign(
        "control characters in a name", sample("m\x1b[2J", txt=b""), ("m\\x1b[2J has an empty",)
    ),
    foreign(
        "a name that is not UTF-8",
        entry(b"\xff\xfe.jpg", JPEG) + entry(b"\xff\xfe.txt", b"A dog"),
        ("sample \\udcff\\udcfe has a name that is not UTF-8",),
    ),
    foreign(
        "half a character", described("m", captions=["\ud800"]), ("caption that is not Unicode",)
    ),
    foreign(
        "json 100,000 levels deep", sample("m", json=deep(10**5)), ("json that is not an object",)
    ),
    foreign(
        "json with a huge number", sample("m", json=b"9" * 10**6), ("json that is not an object",)
    ),
    foreign("a huge image id", described("m", image_id=2**64), extra="m"),
    foreign("a negative image id", described("m", image_id=-1), extra="m"),
    foreign("json with NaN", sample("m", json=b'{"image_id": NaN, "label": -Infinity}'), extra="m"),
    foreign("a key twice in json", sample("m", json=b'{"label": 1, "label": 2}'), extra="m"),
    foreign("json that is a list", sample("m", json=b"[1, 2]"), ("json that is not an object",)),
    foreign("json that is cut", sample("m", json=b'{"captions": ["A'), ("not an object",)),
    foreign(
        "captions that are numbers", described("m", captions=[1, 2]), ("m has an empty caption",)
    ),
    foreign("captions that are a text", described("m", captions="A dog"), extra="m"),
    foreign(
        "a sparse member",
        pax(**{"GNU.sparse.size": str(2**40), "GNU.sparse.map": f"0,0,{2**40},0"}) + sample("m"),
        ("sample m has no image",),
    ),
    foreign("a size of 2^60 in an extended header", pax(size=str(2**60)) + sample("m"), code=4),
    foreign(
        "a negative size in an extended header", pax(size="-512") + sample("m"), ("-512",), code=4
    ),
    foreign(
        "a negative size",
        entry("m.jpg", size=b"\xff" * 10 + b"\xfe\0"),
        ("a size of -512",),
        code=4,
    ),
    foreign(
        "an extended header of 1 MB",
        entry("p", b"1" * 2**20, tarfile.XHDTYPE) + sample("m"),
        ("extended header of 1,048,576 bytes",),
        code=4,
    ),
    foreign("5,000 extended headers in a row", pax(a="b") * 5000 + sample("m"), code=4),
    foreign("a damaged header", b"\xff" * BLOCK, ("damaged tar header",), code=4),
    foreign("a member larger than the shard", entry("m.jpg", b"", size=b"77777777777\0"), code=4),
    foreign("an end in the middle", END, ("goes on behind its end",), code=4),
]
IMAGES = [
    broken("an image of zero bytes", jpg=b""),
    broken("a web page for an image", jpg=b"<html>404</html>"),
    *(
        broken(f"a JPEG cut after {part:.0%}", jpg=JPEG[: int(len(JPEG) * part)])
        for part in (0.01, 0.1, 0.5, 0.9)
    ),
    broken("a PNG of 60,000 x 60,000", "png", png=png_header(60_000, 60_000)),
    broken("a PNG without its pixels", "png", png=png_header(500, 400)),
    broken("a GIF under another name", jpg=animated("GIF")),
    broken(
        "PostScript under another name", jpg=b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    ),
    broken("a TIFF under another name", jpg=saved(Image.new("RGB", (9, 9)), "TIFF")),
    foreign("a PNG under another name", sample("m", jpg=picture(1, form="PNG")), extra="m"),
    foreign("an animated WebP", sample("m", webp=animated("WEBP")), extra="m"),
    foreign("an animated PNG", sample("m", png=animated("PNG")), extra="m"),
    foreign(
        "a PNG of 16 bits", sample("m", png=saved(Image.new("I;16", (9, 9)), "PNG")), extra="m"
    ),
    foreign("a CMYK JPEG", sample("m", jpg=saved(Image.new("CMYK", (9, 9)), "JPEG")), extra="m"),
    foreign("a PNG of one bit", sample("m", png=saved(Image.new("1", (9, 9)), "PNG")), extra="m"),
    foreign("a transparent PNG", sample("m", png=saved(Image.new("LA", (9, 9)), "PNG")), extra="m"),
    foreign("a picture of one pixel", sample("m", jpg=picture(1, (1, 1))), extra="m"),
    foreign("a picture like a thread", sample("m", png=picture(1, (1, 20_000), "PNG")), extra="m"),
    foreign(
        "damaged EXIF",
        sample(
            "m", jpg=saved(Image.new("RGB", (9, 9)), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
        ),
        extra="m",
    ),
]
LONE = [
    lone("a file of zero bytes", shard(b""), "not a whole, plain tar"),
    lone("a text", shard(b"no tar at all" * 100), "not a whole, plain tar"),
    lone("a compressed tar", shard(gzip.compress(sample("m") + END)), "by gzip", "gunzip it"),
    lone("a gzip bomb", shard(gzip_bomb()), "by gzip"),
    lone("a cut tar", shard(sample("m")[:2000]), "is not a whole, plain tar"),
    lone("a folder", lambda place: (place.folder / "y.tar").mkdir(), "not a file"),
    lone("a pipe", lambda place: os.mkfifo(place.folder / "y.tar"), "not a file"),
    lone(
        "a link to itself", lambda place: (place.folder / "y.tar").symlink_to("y.tar"), "not a file"
    ),
    lone("a link to nothing", lambda place: (place.folder / "y.tar").symlink_to("z"), "not a file"),
    lone("a device", lambda place: (place.folder / "y.tar").symlink_to("/dev/zero"), "not a file"),
    Fault(
        "a tar without members",
        beside_good(shard(bytes(10240))),
        (("index", 0, ("2 shards, 4 images",)), ("verify", 0, ()), ("stream", 0, ())),
    ),
    Fault(
        "a key in two shards",
        beside_good(shard(sample("a") + END)),
        (
            ("index", 0, ("y.tar: sample a its key is in x.tar too",)),
            ("verify", 0, ()),
            ("stream", 0, ()),
        ),
    ),
    Fault(
        "no shard at all",
        lambda place: None,
        (
            ("index", 4, ("no shard matches",)),
            ("verify", 4, ("mmscale index",)),
            ("stream", 4, ("mmscale index",)),
        ),
    ),
]

FAULTS = [*FOREIGN, *IMAGES, *LONE]
