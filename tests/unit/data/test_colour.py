"""Deep and odd modes of Pillow's images, in every place that turns a picture into RGB."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from mmscale.contracts import InputSpec
from mmscale.data.damage import DamagedSampleError
from mmscale.data.decoded_cache import Shrinking
from mmscale.data.pixels import SIDE, decode, in_rgb, thumbnail
from mmscale.data.shard_writer import Treatment, prepare_image
from mmscale.errors import DataError
from mmscale.evaluation.trained import Transform

# Every upper byte with several lower ones.
RAMP = np.linspace(0, 65535, 128 * 128).astype(np.uint16).reshape(128, 128)
WANTED = (RAMP >> 8).astype(np.uint8)
CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}


def png(colour_type, pixels=RAMP):
    """A PNG of 16 bits a channel, written without Pillow: every channel holds the ramp."""
    rows = np.repeat(pixels.astype(">u2")[:, :, None], CHANNELS[colour_type], 2)

    def chunk(name, data):
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    height, width = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def spec(size):
    return InputSpec(size, (0.0,) * 3, (1.0,) * 3, "bicubic", lambda c: [[1] for _ in c], 0, 8)


@pytest.mark.parametrize("colour_type", CHANNELS)
def test_sixteen_bits_keep_their_upper_eight(colour_type):
    pixels = decode(png(colour_type), "here")
    assert torch.equal(pixels, torch.from_numpy(WANTED).expand(3, -1, -1))


def test_the_cache_and_thumbnails_show_the_ramp():
    kept = Shrinking(32, "bicubic", True)(png(0), "here").pixels()
    with Image.open(io.BytesIO(thumbnail(png(0), "here"))) as image:
        small = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    for pixels, side, gap in ((kept, 32, 2), (small, SIDE, 8)):
        shown = Image.fromarray(WANTED).resize((side, side), Image.Resampling.BICUBIC)
        wanted = torch.from_numpy(np.array(shown)).float()
        assert (pixels.float() - wanted).abs().max() <= gap


def test_packing_smaller_keeps_the_contrast(tmp_path):
    (tmp_path / "x.png").write_bytes(png(0))
    suffix, content = prepare_image(tmp_path / "x.png", Treatment(32, None, 10**6))
    wanted = Image.fromarray(WANTED).resize((32, 32), Image.Resampling.BICUBIC, reducing_gap=3.0)
    assert suffix == "png"
    got = decode(content, "here").float()
    assert (got - torch.from_numpy(np.array(wanted)).float()).abs().max() <= 1
    assert prepare_image(tmp_path / "x.png", Treatment(None, None, 10**6)) == ("png", png(0))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I;16N"])
def test_a_loaded_models_transform_takes_them_too(mode):
    order = ">u2" if mode == "I;16B" else "<u2"
    image = Image.frombytes(mode, RAMP.shape[::-1], RAMP.astype(order).tobytes())
    got = Transform(spec(128))(image) * 255
    assert torch.allclose(got, torch.from_numpy(WANTED).float().expand(3, -1, -1), atol=1e-3)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_values_without_a_range_are_refused(mode):
    image = Image.fromarray(RAMP.astype(np.int32 if mode == "I" else np.float32))
    assert image.mode == mode
    with pytest.raises(DataError, match=f"mode {mode} holds 32-bit values of no known range"):
        Transform(spec(32))(image)


EIGHT_BITS = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr",
              "HSV"]  # fmt: skip


@pytest.mark.parametrize("mode", EIGHT_BITS)
def test_modes_of_eight_bits_are_shown_as_before(mode):
    seen = Image.fromarray(np.repeat(WANTED[:, :, None], 3, 2))
    image = {
        "La": lambda: seen.convert("LA").convert("La"),
        "RGBa": lambda: seen.convert("RGBA").convert("RGBa"),
        "PA": lambda: seen.convert("P").convert("PA"),
    }.get(mode, lambda: seen.convert(mode))()
    assert image.mode == mode
    before = image.convert("LA") if mode == "La" else image
    assert np.array_equal(np.array(in_rgb(image)), np.array(before.convert("RGB")))


def test_a_palette_with_alpha_keeps_its_colours_and_says_nothing():
    image = Image.fromarray(np.repeat(WANTED[:, :, None], 3, 2)).convert("P")
    plain = np.array(image.convert("RGB"))
    image.info["transparency"] = bytes(range(256))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(np.array(in_rgb(image)), plain)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_a_library_warns_of_is_told_once_with_the_name(capfd, monkeypatch):
    # Another test's picture may have been told of in this process.
    monkeypatch.setattr("mmscale.data.damage._told", set())
    file = io.BytesIO()
    # A tag block that ends before its first entry.
    exif = b"Exif\0\0MM\0*\0\0\0\x08\x00\x05\x01\x12"
    Image.new("RGB", (8, 8)).save(file, "JPEG", exif=exif)
    for name in ("first.tar sample a", "first.tar sample b"):
        decode(file.getvalue(), name)
    told = capfd.readouterr().err
    assert told.startswith("mmscale: first.tar sample a: Corrupt EXIF data.")
    assert "sample b" not in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"no image", "not a JPEG, PNG or WebP image"), (None, "Image is incomplete or truncated")],
)
def test_reasons_name_no_place_in_a_librarys_source(content, reason):
    if content is None:
        file = io.BytesIO()
        Image.effect_noise((64, 64), 60).convert("RGB").save(file, "JPEG")
        content = file.getvalue()[: len(file.getvalue()) // 2]
    with pytest.raises(DamagedSampleError) as error:
        decode(content, "here")
    assert str(error.value) == f"here: undecodable image ({reason})"
