"""What reaches the device, and as what."""

from dataclasses import replace

import pytest
import torch

from mmscale.contracts import Batch, InputSpec
from mmscale.data.pixels import normalise
from mmscale.engine.feed import images_on, on_device

SPEC = InputSpec(8, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), "bicubic", lambda texts: [], 0, 8)


def batch_of(image):
    rows = len(image)
    ids = torch.arange(rows)
    tokens, mask = torch.ones(rows, 3, dtype=torch.long), torch.ones(rows, 3, dtype=torch.bool)
    keys = [f"{row}#0" for row in range(rows)]
    return Batch(image, tokens, mask, ids, ids + 1, ids + 2, keys, keys)


def pixels(rows=5):
    return torch.randint(0, 256, (rows, 3, 8, 8), dtype=torch.uint8)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu), "meta"])
def test_every_tensor_goes_to_the_device_and_pixels_become_numbers(device):
    batch = batch_of(pixels())
    sent = on_device(batch, torch.device(device), SPEC)
    for name in ("image", "tokens", "mask", "image_ids", "match_ids", "labels"):
        assert getattr(sent, name).device.type == device
        if name != "image" and device != "meta":
            assert torch.equal(getattr(sent, name).cpu(), getattr(batch, name))
    assert sent.image.dtype == torch.float32
    if device != "meta":
        torch.testing.assert_close(sent.image.cpu(), normalise(batch.image, SPEC))
    assert sent.keys == batch.keys


def test_cached_features_stay_as_they_are():
    batch = replace(batch_of(torch.randn(4, 16)), mask=None)
    sent = on_device(batch, torch.device("cpu"), SPEC)
    assert torch.equal(sent.image, batch.image)
    assert sent.mask is None


def test_a_part_of_the_rows_is_that_part_of_the_whole():
    whole = pixels(6)
    parts = [images_on(part, torch.device("cpu"), SPEC) for part in whole.split(4)]
    assert torch.equal(torch.cat(parts), images_on(whole, torch.device("cpu"), SPEC))
