"""What is said of the first batch: images that repeat too often are a warning."""

import pytest
import torch

from mmscale.config.load import load_config
from mmscale.contracts import Batch
from mmscale.training.lines import first_batch_line, repeats_warning


def batch(ids):
    return Batch(
        image=torch.zeros(len(ids), 3, 2, 2),
        tokens=torch.zeros(len(ids), 4, dtype=torch.long),
        mask=None,
        image_ids=torch.tensor(ids),
        match_ids=torch.tensor(ids),
        labels=torch.full((len(ids),), -1),
        keys=["a#0"] * len(ids),
        captions=["a dog"] * len(ids),
    )


@pytest.mark.parametrize(
    ("ids", "captions", "said"),
    [
        ([1, 2, 3, 4] * 16, "random", "only 4 of the 64 images of the first batch are distinct"),
        (list(range(47)) + [0] * 17, "random", "only 47 of the 64"),
        (list(range(48)) + [0] * 16, "random", None),
        (list(range(64)), "random", None),
        # Two captions of each image in one batch were asked for.
        (list(range(32)) * 2, "2", None),
        ([5], "random", None),
    ],
)
def test_images_that_repeat_are_a_warning(ids, captions, said):
    data = load_config(["demo", "data.train=x", f"data.captions={captions}"]).data
    told = repeats_warning(batch(ids), data)
    assert (told is None) if said is None else told.startswith(said)
    assert f"{len(set(ids))} distinct images" in first_batch_line(batch(ids))
