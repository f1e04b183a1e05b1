import pytest
import torch
import torch.nn.functional as F

from mmscale.diagnostics.dataset.shifted import shifted_embeddings, shifted_features
from tests.unit.diagnostics.dataset.towers import features


@pytest.mark.parametrize("shift", [1, -1, 7, -40])
def test_captions_that_all_stand_some_rows_off_are_found(shift):
    image, text = features(1500, 0)
    found = shifted_features(image, text.roll(shift, dims=0))
    assert found.shift == shift
    assert {stretch.shift for stretch in found.stretches} == {shift}
    assert found.share > 0.9


@pytest.mark.parametrize(("first", "end", "shift"), [(300, 420, 1), (700, 1000, -3)])
def test_a_stretch_is_found_with_its_ends(first, end, shift):
    image, text = features(2000, 1)
    text[first:end] = text[first:end].roll(shift, dims=0)
    [stretch] = shifted_features(image, text).stretches
    assert stretch.shift == shift
    assert abs(stretch.first - first) <= 10
    assert abs(stretch.end - end) <= 10


def test_shards_with_shifts_of_their_own_are_told_apart():
    image, text = features(2000, 2)
    text[200:500], text[1200:1500] = text[200:500].roll(2, 0), text[1200:1500].roll(-5, 0)
    found = shifted_features(image, text)
    assert {stretch.shift for stretch in found.stretches} == {2, -5}
    assert 0.27 < found.share < 0.32


def drifting(num: int, seed: int) -> torch.Tensor:
    """Rows of which neighbours resemble each other, as frames of a film do."""
    draws = torch.Generator().manual_seed(seed)
    rows = torch.randn(num, 32, generator=draws)
    for row in range(1, num):
        rows[row] = 0.9 * rows[row - 1] + 0.44 * rows[row]
    return rows


def test_nothing_is_found_in_sound_shuffled_or_slowly_changing_rows():
    image, text = features(1500, 3)
    shuffled = text[torch.randperm(1500, generator=torch.Generator().manual_seed(0))]
    assert shifted_features(image, text).stretches == ()
    assert shifted_features(image, shuffled).stretches == ()
    film = drifting(1500, 0)
    noise = torch.randn(2, 1500, 32, generator=torch.Generator().manual_seed(1))
    frames, words = F.normalize(film + 0.5 * noise[0], dim=1), F.normalize(film + noise[1], dim=1)
    assert shifted_features(frames, words).stretches == ()
    assert shifted_embeddings(frames, words).stretches == ()
    assert shifted_embeddings(frames, words.roll(7, 0)).shift == 7


def test_a_few_rows_say_nothing():
    image, text = features(100, 0)
    assert shifted_features(image, text.roll(1, 0)).stretches == ()
