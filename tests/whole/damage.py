"""What damaged data is made of: tars byte by byte, pictures of every unusual kind."""

import gzip
import io
import json
import struct
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mmscale.data.tar import IMAGE_SUFFIXES

END = bytes(1024)
BLOCK = 512


@dataclass(frozen=True)
class Place:
    """Where a fault is made.

    Attributes:
        folder: The data that gets it.
        outside: A folder beside it, which nothing may touch.
        canary: A file that only code out of the data would write.
    """

    folder: Path
    outside: Path
    canary: Path


def picture(colour: int = 0, size: tuple[int, int] = (40, 30), form: str = "JPEG") -> bytes:
    """A picture; another number, another content."""
    noise = np.random.default_rng(colour).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return saved(Image.fromarray(noise), form)


def saved(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and holds next to nothing."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    shape = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", shape), chunk(b"IDAT", zlib.compress(bytes(1000))), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def animated(form: str) -> bytes:
    frames = [Image.new("RGB", (40, 30), (shade, 0, 0)) for shade in (0, 120, 240)]
    return saved(frames[0], form, save_all=True, append_images=frames[1:])


def entry(
    name: str | bytes,
    content: bytes = b"",
    kind: bytes = tarfile.REGTYPE,
    link: str = "",
    size: bytes | None = None,
) -> bytes:
    """A member's header and content as they lie in a tar.

    Args:
        name: Also one that is not UTF-8.
        content: What follows the header.
        kind: Type of the member.
        link: What it points at.
        size: Other bytes for the header's field of the size.
    """
    info = tarfile.TarInfo("placeholder")
    info.size, info.type, info.linkname = len(content), kind, link
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    header[:100] = (name if isinstance(name, bytes) else name.encode()).ljust(100, b"\0")
    if size is not None:
        header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + content + bytes(-len(content) % BLOCK)


def pax(**records: str) -> bytes:
    """An extended header with these records."""
    content = b""
    for name, value in records.items():
        tail = f" {name}={value}\n".encode()
        length = len(tail) + 1
        while len(str(length)) + len(tail) != length:
            length += 1
        content += str(length).encode() + tail
    return entry("pax", content, tarfile.XHDTYPE)


def sample(key: str, **members: bytes | None) -> bytes:
    """A sample's members; given ones replace those of a good sample, None leaves one out."""
    seed = zlib.crc32(key.encode())
    held: dict[str, bytes | None] = {"jpg": picture(seed), "txt": f"A picture of {key}".encode()}
    held |= members
    if any(suffix in members for suffix in IMAGE_SUFFIXES if suffix != "jpg"):
        held.pop("jpg")
    return b"".join(
        entry(f"{key}.{s}", content) for s, content in held.items() if content is not None
    )


def described(key: str, **fields: object) -> bytes:
    """A sample with a json of these fields."""
    return sample(key, json=json.dumps(fields).encode())


def bomb(canary: Path) -> bytes:
    """A pickle that writes a file when it is loaded."""
    return f"cposix\nsystem\n(S'touch {canary}'\ntR.".encode()


def gzip_bomb() -> bytes:
    return gzip.compress(bytes(50 * 2**20))
