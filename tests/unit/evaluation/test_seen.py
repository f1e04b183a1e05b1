"""Verdicts on how images and captions fit, from rows that a model gave."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmscale.data.shards import open_shards
from mmscale.diagnostics.dataset.copies import SIDE
from mmscale.diagnostics.dataset.verdict import Looks
from mmscale.evaluation.retrieval import embed_set
from mmscale.evaluation.seen import Seen, fitting, load_seeing, see
from mmscale.parallel.peers import Alone
from tests.unit.diagnostics.dataset.towers import features, planted
from tests.unit.model.test_openclip_weights import write_clip

NUM = 1500


def looks_of(num: int) -> Looks:
    """Images of which the third cannot be decoded."""
    return Looks(
        [f"{row:04d}" for row in range(num)],
        np.arange(num) + 5000,
        np.arange(num),
        [b""] * num,
        [""] * num,
        np.zeros((num, SIDE, SIDE), np.uint8),
        [(f"caption {row}",) for row in range(num)],
    )


def seen_of(source: torch.Tensor, together: bool = False) -> Seen:
    """Features of towers that never met, or those of a model: image i has caption source[i]."""
    image, text = features(NUM, 0)
    if together:
        draws = torch.Generator().manual_seed(0)
        text = image + 0.7 * torch.randn(image.shape, generator=draws)
    places = torch.cat([torch.arange(2), torch.arange(3, NUM + 1)])
    return Seen(image, text[source], places, together, len, 77)


def key_of(row: int) -> str:
    return f"{row + (row >= 2):04d}"


@pytest.mark.parametrize("together", [False, True])
def test_mispaired_images_are_counted_named_and_left_out(together):
    source, wrong = planted(NUM, 0.1, 1)
    shifted, found = fitting(looks_of(NUM + 1), seen_of(source, together), print).verdicts
    assert shifted is None
    assert found is not None
    assert found.interval[0] <= 0.1 <= found.interval[1]
    left = set(found.leave_out)
    planted_ids = {int(key_of(row)) + 5000 for row in wrong.nonzero()[:, 0].tolist()}
    assert len(left & planted_ids) >= 0.65 * len(left)
    assert len(left & planted_ids) >= 0.6 * len(planted_ids)
    assert found.examples[0].what.startswith(f"caption {int(found.examples[0].key)} (better than ")


def test_a_shifted_stretch_is_named_left_out_and_not_called_mispaired_too():
    source = torch.arange(NUM)
    source[300:600] = source[300:600].roll(7)
    shifted, mispaired = fitting(looks_of(NUM + 1), seen_of(source), print).verdicts
    assert mispaired is None
    assert shifted is not None
    assert abs(shifted.share - 300 / NUM) < 0.02
    assert shifted.evidence["shift"] == 7
    assert "7 further on better than their own, in 1 stretch" in shifted.sentence
    assert abs(len(shifted.leave_out) - 300) < 25
    assert 5000 + int(shifted.examples[0].key) in shifted.leave_out
    assert int(shifted.examples[0].partner or 0) - int(shifted.examples[0].key) == 7


def test_a_set_that_is_shifted_as_a_whole_is_named_and_not_masked_away():
    seen = seen_of(torch.arange(NUM).roll(1))
    (shifted,) = fitting(looks_of(NUM + 1), seen, print).verdicts
    assert shifted is not None
    assert shifted.share > 0.9
    assert shifted.evidence["shift"] == 1
    assert shifted.leave_out == ()


def test_sound_pairs_have_no_verdict_and_few_pairs_are_told_to_be_too_few():
    told: list[str] = []
    sound = fitting(looks_of(NUM + 1), seen_of(torch.arange(NUM)), told.append)
    assert sound.verdicts == (None, None)
    assert told == []
    image, text = features(150, 0)
    few = Seen(image, text, torch.arange(150), False, len, 77)
    assert fitting(looks_of(150), few, told.append).verdicts == (None,)
    assert told == ["examine: mispaired is told of 200 images, here are 150"]


def test_a_named_model_is_asked_in_its_own_space(synthetic, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    name = f"openclip:{write_clip(tmp_path / 'clip', {})}"
    shards = open_shards("DATA", str(synthetic.val))
    loaded = load_seeing(name, ["engine.device=cpu"])
    seen = see(loaded, True, shards, 0, print)
    pairs = embed_set(loaded, shards, Alone())
    assert seen.together
    torch.testing.assert_close(seen.image, pairs.image)
    # Five captions an image: the direction of their mean.
    means = F.normalize(pairs.text.view(len(pairs.image), 5, -1).mean(dim=1), dim=1)
    torch.testing.assert_close(seen.text, means)
    assert seen.context_length == loaded.spec.context_length
