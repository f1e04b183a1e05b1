"""Pixels against OpenCLIP's own transform and Pillow; crops against torchvision's law."""

import io
import math
import random
import zlib
from itertools import product
from typing import get_args

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import RandomResizedCrop

from mmscale.config.data import DataConfig
from mmscale.contracts import InputSpec
from mmscale.data.damage import DamagedSampleError
from mmscale.data.pixels import (
    EvalTransform,
    TrainTransform,
    decode,
    draw_box,
    normalise,
    open_picture,
    stack_rows,
)

SIZE = 96
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
AUGMENTS = get_args(DataConfig.model_fields["augment"].annotation)


def spec(size=SIZE, interpolation="bicubic", resize="shortest"):
    def tokenize(captions):
        return [[1] for _ in captions]

    return InputSpec(size, MEAN, STD, interpolation, tokenize, 0, 8, resize=resize)


def scene(height, width, kind="photograph"):
    """Noise, a gradient, or both with hard edges, which is what resampling gets wrong."""
    rng = np.random.default_rng(height * 1000 + width)
    noise = rng.integers(0, 256, (height, width, 3))
    y, x = np.mgrid[:height, :width]
    slope = np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (height + width)], 2)
    if kind == "noise":
        return Image.fromarray(noise.astype(np.uint8))
    if kind == "gradient":
        return Image.fromarray(slope.astype(np.uint8))
    blocks = np.where(((x // 17 + y // 23) % 2)[..., None], slope, 255 - slope)
    return Image.fromarray((0.8 * blocks + 0.2 * noise).clip(0, 255).astype(np.uint8))


def encoded(image, form="JPEG", **options):
    file = io.BytesIO()
    if form == "JPEG":
        options.setdefault("quality", 90)
    image.save(file, form, **options)
    return file.getvalue()


def gap(content, size=SIZE, interpolation="bicubic", resize="shortest"):
    """Mean and largest difference in grey levels from OpenCLIP's transform of Pillow's image."""
    theirs = open_clip.image_transform(
        size,
        is_train=False,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        interpolation=interpolation,
        resize_mode=resize,
    )
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    wanted = theirs(image) * 255
    got = EvalTransform(spec(size, interpolation, resize))(decode(content, "here")).float()
    difference = (got - wanted).abs()
    return difference.mean().item(), difference.max().item()


def assert_agrees(content, **options):
    mean, largest = gap(content, **options)
    assert mean < 0.1
    assert largest < 2.001


SHAPES = [(375, 500), (96, 96), (95, 200), (31, 300), (600, 401), (97, 96)]


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_evaluation_pixels_are_open_clips(height, width):
    kinds, modes = ("noise", "gradient", "photograph"), ("bicubic", "bilinear")
    for kind, interpolation in product(kinds, modes):
        image = scene(height, width, kind)
        assert_agrees(encoded(image), interpolation=interpolation)
        assert_agrees(encoded(image, subsampling=0, quality=75), interpolation=interpolation)
        assert_agrees(encoded(image, "PNG"), interpolation=interpolation)


@pytest.mark.parametrize("resize", ["squash", "longest"])
@pytest.mark.parametrize(("height", "width"), [*SHAPES, (500, 375), (3, 400)])
def test_whole_pictures_are_resized_as_open_clip_resizes(height, width, resize):
    for interpolation in ("bicubic", "bilinear"):
        content = encoded(scene(height, width), "PNG")
        assert_agrees(content, interpolation=interpolation, resize=resize)


@pytest.mark.parametrize(
    ("mode", "form"),
    [("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG"), ("LA", "PNG"), ("1", "PNG"),
     ("RGBA", "WEBP"), ("RGB", "WEBP")],
)  # fmt: skip
def test_other_modes_are_converted_as_open_clips_reader_does(mode, form):
    image = scene(200, 300)
    if mode in ("RGBA", "LA"):
        image.putalpha(image.convert("L"))
        image = image.convert(mode)
    else:
        image = image.convert(mode)
    assert_agrees(encoded(image, form))


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_turned_photograph_is_shown_upright(orientation, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(scene(120, 200), form, exif=exif)
    assert_agrees(content)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)).convert("RGB"))
    picture = open_picture(content, "here")
    assert (picture.width, picture.height) == upright.size
    wanted = torch.from_numpy(np.array(upright)).permute(2, 0, 1)
    assert torch.equal(picture.pixels(), wanted)


def test_a_damaged_tag_block_is_ignored():
    content = encoded(scene(50, 60), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert decode(content, "here").shape == (3, 50, 60)


def test_real_photographs_agree(test_data):
    paths = sorted((test_data / "coco-cc").rglob("*.jpg"))
    assert len(paths) == 20
    for path in paths:
        assert_agrees(path.read_bytes(), size=224)


def test_embeddings_are_open_clips():
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-S-32", force_image_size=SIZE).eval()
    theirs = open_clip.image_transform(SIZE, is_train=False, mean=MEAN, std=STD)
    pictures = [scene(*shape, kind) for shape in SHAPES for kind in ("noise", "photograph")]
    contents = [encoded(picture) for picture in pictures]
    images = [Image.open(io.BytesIO(content)).convert("RGB") for content in contents]
    transform = EvalTransform(spec())
    pixels = stack_rows([transform(decode(content, "here")) for content in contents])
    with torch.no_grad():
        wanted = model.encode_image(torch.stack(list(map(theirs, images))), normalize=True)
        got, turned = (
            model.encode_image(normalise(block, spec()), normalize=True)
            for block in (pixels, pixels.flip(2))
        )
    assert (got - wanted).abs().max() < 1e-3
    assert (turned - wanted).abs().max() > 1e-2, "else the measure sees nothing"


def test_normalising_is_fp32_arithmetic_in_the_plain_layout():
    pixels = torch.randint(0, 256, (4, 5, 7, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    got = normalise(pixels, spec())
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    assert torch.equal(got, (pixels.float() / 255 - mean) / std)
    assert got.is_contiguous()


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "EPS", "PPM"])
def test_no_other_format_is_opened(form):
    with pytest.raises(DamagedSampleError, match="here: undecodable"):
        decode(encoded(scene(40, 40), form), "here")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_half_a_picture_is_damaged(form):
    content = encoded(scene(200, 200), form)
    with pytest.raises(DamagedSampleError, match="here"):
        decode(content[: len(content) // 2], "here")


def test_too_many_pixels_are_refused_from_the_header():
    header = encoded(Image.new("L", (8, 8)), "PNG")
    # Sides of 60,000 pixels and a checksum that fits.
    sides = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + header[24:29]
    content = header[:12] + sides + zlib.crc32(sides).to_bytes(4, "big") + header[33:]
    with pytest.raises(DamagedSampleError, match="here"):
        open_picture(content, "here")


def test_boxes_follow_the_law_of_random_resized_crop():
    height, width, scale = 300, 400, (0.3, 1.0)
    draw = random.Random(0)
    ours = [draw_box(height, width, scale, draw) for _ in range(3000)]
    image = torch.empty(3, height, width)
    theirs = [RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(3000)]

    def figures(boxes):
        boxes = np.array(boxes, dtype=float)
        area = boxes[:, 2] * boxes[:, 3] / (height * width)
        return area, np.log(boxes[:, 3] / boxes[:, 2]), boxes[:, 0] / height, boxes[:, 1] / width

    for mine, other in zip(figures(ours), figures(theirs), strict=True):
        # Kolmogorov and Smirnov's distance: above this by chance once in a million.
        places = np.sort(np.concatenate([mine, other]))
        ranks = [np.searchsorted(np.sort(x), places, side="right") / 3000 for x in (mine, other)]
        assert np.abs(ranks[0] - ranks[1]).max() < 0.07
    assert all(t >= 0 and le >= 0 and t + h <= height and le + w <= width for t, le, h, w in ours)


@pytest.mark.parametrize(("height", "width"), [(20, 2000), (2000, 20), (1, 1)])
def test_a_box_in_a_narrow_picture_is_its_middle(height, width):
    wanted = RandomResizedCrop.get_params(torch.empty(3, height, width), (0.9, 1.0), (3 / 4, 4 / 3))
    assert draw_box(height, width, (0.9, 1.0), random.Random(1)) == tuple(wanted)


@pytest.mark.parametrize("augment", AUGMENTS)
def test_rows_repeat_from_their_seed_alone(augment):
    content = encoded(scene(200, 260))
    transform = TrainTransform(spec(), augment, (0.5, 1.0))
    seeds = list(range(8))
    before = torch.get_rng_state()
    rows = transform(content, "here", seeds)
    assert torch.equal(torch.get_rng_state(), before), "the generator of the process is not moved"
    torch.manual_seed(123)
    random.seed(5)
    again = [transform(content, "here", [seed])[0] for seed in reversed(seeds)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(rows, again, strict=True))
    assert all(row.shape == (3, SIZE, SIZE) and row.dtype == torch.uint8 for row in rows)
    assert (len({row.numpy().tobytes() for row in rows}) == 1) == (augment == "none")


@pytest.mark.parametrize("augment", [name for name in AUGMENTS if name not in ("none", "crop")])
def test_named_augmentations_do_something_to_the_crop(augment):
    content = encoded(scene(200, 260))
    plain, more = (TrainTransform(spec(), name, (0.9, 1.0)) for name in ("crop", augment))
    seeds = list(range(20))
    pairs = zip(plain(content, "", seeds), more(content, "", seeds), strict=True)
    changed = [not torch.equal(a, b) for a, b in pairs]
    assert sum(changed) > 4
    if augment == "flip":
        pairs = list(zip(plain(content, "", seeds), more(content, "", seeds), strict=True))
        assert all(torch.equal(a, b) or torch.equal(a.flip(2), b) for a, b in pairs)
        assert not all(changed)


def test_without_augmentation_training_sees_what_evaluation_sees():
    content = encoded(scene(200, 260))
    row = TrainTransform(spec(), "none", (0.9, 1.0))(content, "here", [3])[0]
    assert torch.equal(row, EvalTransform(spec())(decode(content, "here")))


def crop_of_everything(content, seed, size, scale):
    """A row the long way: all pixels, then Pillow's box filter."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    top, left, height, width = draw_box(image.height, image.width, scale, random.Random(seed))
    box = (left, top, left + width, top + height)
    return torch.from_numpy(np.array(image.resize((size, size), Image.Resampling.BICUBIC, box)))


@pytest.mark.parametrize("side", [100, 300, 420, 800])
@pytest.mark.parametrize("orientation", [1, 6])
def test_rows_are_crops_of_the_picture_however_it_was_decoded(side, orientation):
    smooth = scene(9, 12).resize((side * 4 // 3, side), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(smooth, quality=95, exif=exif)
    upright = encoded(ImageOps.exif_transpose(Image.open(io.BytesIO(content))), "PNG")
    transform = TrainTransform(spec(48), "crop", (0.4, 1.0))
    for seed, row in enumerate(transform(content, "here", range(4))):
        wanted = crop_of_everything(upright, seed, 48, (0.4, 1.0)).float()
        alone = transform(content, "here", [seed])[0]
        for got in (row, alone):
            # Another corner, or a picture not turned, makes it 40.
            assert (got.permute(1, 2, 0) - wanted).abs().mean() < 3


def test_large_photographs_are_decoded_in_part():
    sizes = []

    class Watched(TrainTransform):
        def _crop(self, pixels, picture, box):
            sizes.append(pixels.shape[1:])
            return super()._crop(pixels, picture, box)

    for side, part in ((191, 1), (200, 2), (400, 4), (800, 8), (2000, 8)):
        sizes.clear()
        Watched(spec(48), "crop", (1.0, 1.0))(encoded(Image.new("RGB", (side, side))), "", [0])
        assert sizes == [(math.ceil(side / part),) * 2]
