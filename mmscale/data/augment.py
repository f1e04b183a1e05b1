"""What becomes of a training crop, by the name of `data.augment`; drawn from torch's generator."""

from collections.abc import Callable

from torch import Tensor
from torchvision.transforms import v2

# The strengths that OpenCLIP's recipes give to --aug-cfg.
_JITTER, _JITTER_SHARE, _GREY_SHARE = (0.32, 0.32, 0.32, 0.08), 0.8, 0.2


def augmentation(name: str) -> Callable[[Tensor], Tensor] | None:
    """uint8 crop to uint8 crop; None where the crop stays as it is.

    `flip` mirrors half of the pictures, which makes captions wrong that say left or right.
    """
    if name == "flip":
        return v2.RandomHorizontalFlip()
    if name == "color_jitter":
        return v2.Compose(
            [
                v2.RandomApply([v2.ColorJitter(*_JITTER)], _JITTER_SHARE),
                v2.RandomGrayscale(_GREY_SHARE),
            ]
        )
    if name == "randaugment":
        return v2.RandAugment(interpolation=v2.InterpolationMode.BILINEAR)
    if name == "trivialaugment":
        return v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR)
    return None
