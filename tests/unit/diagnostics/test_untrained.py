"""What untrained towers make of right pairs, and of wrong ones: real code, drawn weights."""

import io

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from mmscale.data.scenes import draw_scene, paint
from mmscale.data.synth import describe_scene
from mmscale.diagnostics.doctor import Diagnosis, diagnose
from mmscale.diagnostics.pairs import Pairs
from tests.unit.diagnostics.faulty_embeddings import isotropic

SCENES = 250


@pytest.fixture(scope="module")
def towers() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features of an untrained CLIP: of scenes, of their first captions, of their second."""
    torch.manual_seed(3)
    clip = open_clip.CLIP(
        128,
        {"image_size": 48, "layers": 3, "width": 128, "patch_size": 8},
        {"context_length": 48, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 3},
    ).eval()
    tokenize = open_clip.SimpleTokenizer(context_length=48)
    scenes = [draw_scene(7, index) for index in range(SCENES)]
    pixels = np.stack(
        [
            np.array(Image.open(io.BytesIO(paint(scene, 48, 90, (7, index)))))
            for index, scene in enumerate(scenes)
        ]
    )
    captions = [describe_scene(scene, str(index)) for index, scene in enumerate(scenes)]
    with torch.no_grad():
        image = clip.encode_image(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1)
        first, second = (
            clip.encode_text(tokenize([texts[place] for texts in captions])) for place in (0, 1)
        )
    return image, first, second


def diagnosed(image: torch.Tensor, *captions: torch.Tensor) -> Diagnosis:
    """Of an untrained space, with these features behind it; a tensor holds a caption an image."""
    num = len(image)
    ids = torch.arange(num)
    space = isotropic(num * (1 + len(captions)), 64, 0).image
    pairs = Pairs(
        image=space[:num],
        text=space[num:],
        image_ids=ids,
        text_ids=ids.repeat(len(captions)),
        backbone_image=image,
        backbone_text=torch.cat(captions),
    )
    return diagnose(pairs)


@pytest.mark.parametrize("num", [64, 96, SCENES])
@pytest.mark.parametrize("captions", [1, 2])
def test_untrained_towers_are_unaligned_and_never_called_shuffled(towers, num, captions):
    image, *texts = (side[:num] for side in towers)
    diagnosis = diagnosed(image, *texts[:captions])
    assert diagnosis.verdict == "unaligned"
    assert "shuffled_pairs" not in diagnosis.also
    assert "cannot show whether the pairs are right" in diagnosis.causes[0]


def test_captions_joined_one_by_one_to_wrong_images_show_even_in_untrained_towers(towers):
    image, *texts = towers
    order = torch.randperm(2 * SCENES, generator=torch.Generator().manual_seed(0))
    mixed = torch.cat(texts)[order]
    diagnosis = diagnosed(image, *mixed.chunk(2))
    assert diagnosis.verdict == "shuffled_pairs"
    assert "do not resemble each other" in diagnosis.causes[0]


def _related(num: int, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of towers that know something: a share of each one's power is common."""
    draw = torch.Generator().manual_seed(seed)
    common, *own = (torch.randn(num, 64, generator=draw) for _ in range(3))
    return tuple(share**0.5 * common + (1 - share) ** 0.5 * part for part in own)  # type: ignore[return-value]


@pytest.mark.parametrize("num", [40, 128, 512])
def test_towers_that_know_something_tell_right_pairs_from_shuffled_ones(num):
    right = [diagnosed(*_related(num, 0.6, seed)) for seed in range(5)]
    assert {each.verdict for each in right} == {"unaligned"}
    mixed = [
        diagnosed(image, text.roll(1, dims=0))
        for image, text in (_related(num, 0.6, seed) for seed in range(5))
    ]
    shuffled = [each for each in mixed if each.verdict == "shuffled_pairs"]
    assert len(shuffled) >= (3 if num == 40 else 4)


def test_too_few_pairs_are_said_to_be_too_few():
    image, text = _related(48, 0.28, 1)
    diagnosis = diagnosed(image, text)
    assert diagnosis.verdict == "unaligned"
    assert 0 < diagnosis.evidence["backbone_cka_z"] < 6
    assert "On 48 pairs" in diagnosis.causes[0]


def test_a_verdict_says_on_how_many_pairs_it_stands_and_what_would_change_it(towers):
    diagnosis = diagnosed(*(side[:96] for side in towers[:2]))
    assert diagnosis.pairs == 96
    assert "auc_centred above 0.6" in diagnosis.would_change
