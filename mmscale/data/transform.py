"""Image bytes to pixels: decoding, resizing and cropping on uint8 tensors, all by torchvision.

Normalisation happens after batching; see `normalise`.
"""

import io
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from mmscale.contracts import InputSpec
from mmscale.data.shards import DamagedSampleError

MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs


def decode(content: bytes, where: str) -> UInt8[Tensor, "3 h w"]:
    """RGB pixels, turned upright by EXIF.

    Raises:
        DamagedSampleError: Not an image, truncated, or too many pixels.
    """
    try:
        with Image.open(io.BytesIO(content)) as header:
            pixels, mode = header.width * header.height, header.mode
            if pixels > MAX_PIXELS:
                raise DamagedSampleError(f"{where}: {pixels} pixels, more than {MAX_PIXELS}")
            if mode in ("RGB", "L"):
                data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
                return decode_image(data, ImageReadMode.RGB, apply_exif_orientation=True)
            # Palettes, alpha and CMYK: Pillow converts them as every reader of the field does.
            return torch.from_numpy(np.array(header.convert("RGB"))).permute(2, 0, 1).contiguous()
    except DamagedSampleError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedSampleError(f"{where}: undecodable image ({reason})") from error


def eval_transform(spec: InputSpec) -> Callable[[Tensor], Tensor]:
    """Shortest side to the input size, centre crop: what OpenCLIP evaluates with."""
    return v2.Compose(
        [
            v2.Resize(spec.image_size, _interpolation(spec), antialias=True),
            v2.CenterCrop(spec.image_size),
        ]
    )


def train_transform(
    spec: InputSpec, augment: str, crop_scale: tuple[float, float]
) -> Callable[[Tensor], Tensor]:
    """`none`: as in evaluation; `crop`: a random resized crop drawn from torch's generator."""
    if augment == "none":
        return eval_transform(spec)
    return v2.RandomResizedCrop(
        spec.image_size, scale=crop_scale, interpolation=_interpolation(spec), antialias=True
    )


def normalise(pixels: UInt8[Tensor, "b c h w"], spec: InputSpec) -> Float[Tensor, "b c h w"]:
    """Bytes to fp32 with the tower's mean and deviation, on whatever device they lie."""
    mean = torch.tensor(spec.mean, device=pixels.device)[:, None, None]
    std = torch.tensor(spec.std, device=pixels.device)[:, None, None]
    return (pixels.float() / 255 - mean) / std


def _interpolation(spec: InputSpec) -> v2.InterpolationMode:
    return v2.InterpolationMode(spec.interpolation)
