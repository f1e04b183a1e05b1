"""Captions in other rows are told by how they stand there; towers that never met have no order."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mmscale.diagnostics.doctor import diagnose
from mmscale.diagnostics.mixture import LARGEST_SAMPLE
from mmscale.diagnostics.order import SURE, order_figures
from mmscale.diagnostics.rules_pairing import ELSEWHERE_Z
from tests.unit.diagnostics.faulty_embeddings import (
    anisotropic,
    blockwise,
    dead,
    few_factors,
    healthy,
    isotropic,
    load_features,
    low_rank,
    mispaired,
    moved,
    repeated,
    rotated,
    weak,
    with_features,
)

MOVES = {
    "row i + 1": lambda text: text.roll(1, 0),
    "row i - 1": lambda text: text.roll(-1, 0),
    "row i + 97": lambda text: text.roll(97, 0),
    "within blocks of 20 rows: row i of the images fits row i + 8": blockwise(20, 8),
    "reversed: the first": lambda text: text.flip(0),
    "reversed, shifted by 5": lambda text: text.flip(0).roll(5, 0),
}


@pytest.mark.parametrize("words", MOVES)
@pytest.mark.parametrize("make", [healthy(0.7), weak], ids=["healthy", "weak"])
def test_shifts_and_reversals_of_rows_are_named(make, words):
    diagnosis = diagnose(moved(make, MOVES[words])(300, 128, 0))
    assert diagnosis.verdict == "shuffled_pairs"
    assert words in diagnosis.causes[0]
    assert not any("cannot be told" in cause for cause in diagnosis.causes)


def test_permuted_rows_are_called_a_permutation():
    permuted = moved(healthy(0.7), lambda text: text[torch.randperm(len(text))])
    for width in (64, 256):
        diagnosis = diagnose(permuted(200, width, width))
        assert diagnosis.verdict == "shuffled_pairs"
        assert "a permutation" in diagnosis.causes[0]


def test_rows_missing_on_one_side_are_named_as_a_shift():
    pairs = healthy(0.7)(400, 64, 0)
    ids = torch.arange(397)
    short = replace(
        pairs, image=pairs.image[:397], text=pairs.text[3:], image_ids=ids, text_ids=ids
    )
    diagnosis = diagnose(short)
    assert "row i of the images fits row i - 3" in diagnosis.causes[0]


def test_half_of_the_rows_shifted_is_a_mixture_with_an_order():
    half = moved(healthy(0.5), lambda text: torch.cat([text[:300], text[300:].roll(1, 0)]))
    diagnosis = diagnose(half(600, 64, 0))
    assert diagnosis.verdict == "shuffled_pairs"
    assert "row i + 1" in diagnosis.causes[0]
    assert "of the pairs belong together" in diagnosis.causes[1]
    assert diagnosis.evidence["shift_share"] == pytest.approx(0.5, abs=0.1)


def test_a_shift_is_found_in_more_rows_than_a_sample_holds():
    """A sample that is thinned evenly would have neither row's neighbour."""
    figures = order_figures(
        moved(healthy(0.7), lambda text: text.roll(1, 0))(LARGEST_SAMPLE + 904, 16, 0)
    )
    assert figures["health/shift"] == 1.0
    assert figures["health/shift_share"] > 0.9


def test_five_captions_an_image_in_another_order():
    pairs = healthy(0.5)(200, 64, 0)
    five = replace(
        pairs, text=pairs.text.roll(2, 0).repeat(5, 1), text_ids=pairs.text_ids.repeat(5)
    )
    assert "row i + 2" in diagnose(five).causes[0]


def random_heads(num, width, seed):
    """Right pairs of towers that know what they see, through heads that were never trained."""
    made = with_features(isotropic, True)(num, width, seed)
    sides = [
        rows
        @ torch.randn(rows.shape[1], width, generator=torch.Generator().manual_seed(seed + part))
        for part, rows in enumerate((made.backbone_image, made.backbone_text))
    ]
    image, text = (torch.nn.functional.normalize(rows, dim=1) for rows in sides)
    return replace(made, image=image, text=text, backbone_image=None, backbone_text=None)


UNALIGNED = {
    "random heads": random_heads,
    "isotropic": isotropic,
    "rotated": rotated,
    "few directions": moved(low_rank(20, 0.1), lambda text: text @ turn(text.shape[1])),
    "few factors": moved(few_factors, lambda text: text @ turn(text.shape[1])),
    "five rows an image": moved(repeated(5), lambda text: text @ turn(text.shape[1])),
    "any spectrum": moved(anisotropic, lambda text: text @ turn(text.shape[1])),
}


def turn(width: int) -> torch.Tensor:
    """A rotation, another one each time."""
    return torch.linalg.qr(torch.randn(width, width))[0]


@pytest.mark.parametrize("name", UNALIGNED)
def test_towers_that_never_met_have_no_order(name):
    """1,000 draws under `make test-soak`, by the next test."""
    check_no_order(name, 6)


@pytest.mark.soak
@pytest.mark.parametrize("name", UNALIGNED)
def test_towers_that_never_met_have_no_order_in_1000_draws(name):
    check_no_order(name, 170)


def check_no_order(name, draws):
    most: dict[str, float] = {}
    for seed in range(draws):
        num = (64, 200, 500)[seed % 3]
        figures = order_figures(UNALIGNED[name](num, 64, seed))
        for key in ("shift_z", "reversed_z", "elsewhere_z"):
            most[key] = max(most.get(key, 0.0), figures[f"health/{key}"])
    print(f"{name:>20}: {most}")
    assert max(most["shift_z"], most["reversed_z"]) < SURE
    assert most["elsewhere_z"] < ELSEWHERE_Z


def test_neighbours_that_resemble_each_other_are_no_shift():
    """Rows sorted by what they show: the towers never met, yet each class prefers another."""
    for seed in range(30):
        rng = np.random.default_rng(seed)
        classes = np.repeat(np.arange(50), 8)
        sides = []
        for _ in range(2):
            centres = torch.tensor(rng.normal(size=(50, 64)))[classes]
            sides.append(centres + 0.3 * torch.tensor(rng.normal(size=(400, 64))))
        image, text = (torch.nn.functional.normalize(rows, dim=1).float() for rows in sides)
        figures = order_figures(replace(isotropic(400, 64, 0), image=image, text=text))
        assert max(figures["health/shift_z"], figures["health/reversed_z"]) < SURE


def test_the_shift_of_sorted_rows_is_the_one_applied():
    """Rows resemble those beside them; the right one is a little nearer than they are."""
    rng = np.random.default_rng(0)
    meaning = np.repeat(rng.normal(size=(20, 64)), 20, axis=0) + rng.normal(size=(400, 64))
    sides = [torch.tensor(meaning + 0.5 * rng.normal(size=(400, 64))) for _ in range(2)]
    image, text = (torch.nn.functional.normalize(rows, dim=1).float() for rows in sides)
    for shift in (-30, 2):
        pairs = replace(isotropic(400, 64, 0), image=image, text=text.roll(shift, 0))
        assert order_figures(pairs)["health/shift"] == shift


def test_a_constant_tower_has_no_order():
    figures = order_figures(dead("text")(200, 64, 0))
    assert figures["health/shift_z"] == 0.0
    assert figures["health/elsewhere_z"] <= 0.0


def test_trained_clip_in_another_order(real_data):
    whole = load_features(real_data, "features_clip.npy")
    for words, move in {**MOVES, "a permutation": lambda text: text[torch.randperm(500)]}.items():
        diagnosis = diagnose(replace(whole, text=move(whole.text)))
        assert diagnosis.verdict == "shuffled_pairs"
        assert words in diagnosis.causes[0]
    half = diagnose(mispaired(lambda *_: whole, 0.5)(500, 512, 0))
    assert half.verdict == "shuffled_pairs"


def test_untrained_clip_has_no_order(real_data):
    whole = load_features(real_data, "features_clip_random.npy")
    diagnosis = diagnose(whole)
    assert "cannot be told apart" in " ".join(diagnosis.causes)
    assert "shuffled_pairs" not in (diagnosis.verdict, *diagnosis.also)
