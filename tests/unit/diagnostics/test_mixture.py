"""Which share of the pairs belongs together, with its interval; no healthy space is a mixture.

`make test-soak` counts what the issue of a mixture is judged by: 200 draws of each kind, share and
size, and 1,000 healthy spaces. Run with `-s` to see the counts.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mmscale.diagnostics.doctor import bare, diagnose, judge
from mmscale.diagnostics.geometry import health_figures
from mmscale.diagnostics.mixture import TOLERATED, mixture_figures, share_figures
from mmscale.diagnostics.pairing import pairing_figures
from mmscale.diagnostics.pairs import Pairs
from mmscale.diagnostics.rules_pairing import MOSTLY_MISPAIRED_Z, mixed_surely
from mmscale.diagnostics.rules_pairing import SHARES as SHARES_TOLD
from tests.unit.diagnostics.faulty_embeddings import (
    anisotropic,
    few_factors,
    healthy,
    hubby,
    isotropic,
    load_features,
    mispaired,
    repeated,
    weak,
)

SHARES = (0.1, 0.25, 0.5, 0.75)
DRAWN = {"anisotropic": anisotropic, "weak": weak, "few factors": few_factors}


def bootstrapped(whole: Pairs):
    """Pairs of real features, drawn with repetition where more are wanted than there are."""

    def make(num: int, width: int, seed: int) -> Pairs:
        rng = np.random.default_rng(seed)
        known = len(whole.image)
        rows = rng.permutation(known)[:num] if num <= known else rng.integers(0, known, num)
        ids = torch.arange(num)
        return Pairs(whole.image[rows], whole.text[rows], ids, ids)

    return make


def counted(make, share: float, num: int, draws: int, width: int = 64) -> dict[str, float]:
    """How often the share is near or inside of its interval, how wide that is, and the verdict."""
    true = 1 - round(share * num) / num
    found = [
        bare(mixture_figures(mispaired(make, share)(num, width, seed))) for seed in range(draws)
    ]
    told, low, high, wrong = (
        np.array([figures[name] for figures in found]) for name in (*SHARES_TOLD, "mispaired_z")
    )
    inside = (low - 1e-9 <= true) & (true <= high + 1e-9)
    return {
        "inside": float(inside.mean()),
        "right": float((inside | (np.abs(told - true) <= 0.05)).mean()),
        "width": float((high - low).mean()),
        "called": float(np.mean([mixed_surely(figures) > 0.5 for figures in found])),
        "most": float(wrong.max()),
    }


def test_matched_share_of_two_separate_normals_is_recovered():
    """Normal laws four deviations apart, by their quantiles: nothing is left to chance."""
    for share in (0.2, 0.5, 0.9):
        up, down = round(1000 * share), round(1000 * (1 - share))
        laws = [torch.special.ndtri((torch.arange(num).double() + 0.5) / num) for num in (up, down)]
        figures = share_figures(torch.cat([laws[0] + 4, laws[1]]))
        assert figures["matched_share"] == pytest.approx(share, abs=0.03)
        assert figures["matched_share_low"] < share < figures["matched_share_high"]
        assert figures["matched_share_high"] - figures["matched_share_low"] < 0.25


def test_one_hump_is_no_mixture_however_weak():
    law = torch.special.ndtri((torch.arange(2000).double() + 0.5) / 2000)
    for shift in (1.0, 2.0, 3.0):
        figures = share_figures(law + shift)
        assert figures["matched_share_high"] == 1.0
        assert figures["mispaired_z"] < 1.0


def test_matched_share_of_one_normal_has_the_interval_0_to_1():
    """Pairs of which nothing is known may all be matched, and none."""
    figures = share_figures(torch.special.ndtri((torch.arange(400).double() + 0.5) / 400))
    assert (figures["matched_share_low"], figures["matched_share_high"]) == (0.0, 1.0)
    assert figures["matched_z"] < 2


@pytest.mark.parametrize("share", SHARES)
def test_matched_share_of_drawn_mixtures_lies_in_its_interval(share):
    found = counted(anisotropic, share, 300, 25)
    assert found["right"] >= 0.95
    assert found["width"] < 0.5


@pytest.mark.parametrize(("share", "num"), [(0.5, 200), (0.25, 300), (0.1, 1000)])
def test_a_mixture_is_not_called_healthy(share, num):
    for seed in range(4 if num < 1000 else 1):
        diagnosis = diagnose(mispaired(healthy(0.5), share)(num, 64, seed))
        assert diagnosis.verdict == "shuffled_pairs"
        assert not {"hubness", "false_negatives"} & set(diagnosis.also)
        assert "of the pairs belong together" in diagnosis.causes[0]
        low, high = (diagnosis.evidence[f"matched_share_{end}"] for end in ("low", "high"))
        assert low <= 1 - share <= high < 1 - TOLERATED / 2


def test_one_caption_in_fifty_is_tolerated():
    assert diagnose(mispaired(healthy(0.5), 0.02)(1000, 64, 0)).healthy


@pytest.mark.parametrize("make", [hubby, repeated(5), isotropic])
def test_other_failures_are_no_mixtures(make):
    for seed in range(5):
        assert diagnose(make(400, 64, seed)).verdict != "shuffled_pairs"


def test_where_no_pair_stands_out_nothing_is_mixed():
    pairs = isotropic(200, 64, 0)
    figures = health_figures(pairs) | pairing_figures(pairs)
    figures |= {
        "health/matched_share": 0.1,
        "health/matched_share_low": 0.0,
        "health/matched_share_high": 0.6,
        "health/mispaired_z": 20.0,
    }
    assert judge(figures | {"health/matched_z": 2.0}).verdict == "unaligned"
    assert judge(figures | {"health/matched_z": 20.0}).verdict == "shuffled_pairs"


def test_matched_share_of_mixed_clip_pairs_lies_in_its_interval(real_data):
    make = bootstrapped(load_features(real_data, "features_clip.npy"))
    for share in SHARES:
        found = counted(make, share, 400, 6)
        assert found["right"] > 0.8
    assert counted(make, 0.5, 400, 6)["called"] == 1.0


def _all_kinds(real_data):
    return DRAWN | {"CLIP": bootstrapped(load_features(real_data, "features_clip.npy"))}


@pytest.mark.soak
@pytest.mark.parametrize("name", [*DRAWN, "CLIP"])
@pytest.mark.parametrize("num", [200, 500, 1000, 5000])
def test_200_mixtures_of_each_kind(real_data, name, num):
    for share in SHARES:
        found = counted(_all_kinds(real_data)[name], share, num, 200)
        print(f"{name:>12} {num:>5} pairs, {share:.0%} mispaired: {found}")
        assert found["right"] >= 0.95


@pytest.mark.soak
@pytest.mark.parametrize("name", [*DRAWN, "CLIP"])
def test_1000_healthy_spaces_are_no_mixtures(real_data, name):
    make = _all_kinds(real_data)[name]
    for num, draws in ((64, 250), (200, 350), (500, 300), (2000, 100)):
        found = counted(make, 0.0, num, draws)
        print(f"{name:>12} {num:>5} pairs, healthy: {found}")
        assert found["called"] == 0.0
        assert found["most"] < MOSTLY_MISPAIRED_Z


@pytest.mark.parametrize("right", [0, 2])
def test_captions_beside_the_first_count_as_much(right):
    """One caption of five belongs to its image, whichever it is; the others were permuted."""
    num, draw = 400, torch.Generator().manual_seed(0)
    pairs = healthy(0.7)(num, 64, 0)
    noise = 0.05 * torch.randn(5, num, 64, generator=draw)
    captions = torch.nn.functional.normalize(pairs.text + noise, dim=-1)
    for place in set(range(5)) - {right}:
        captions[place] = captions[place][torch.randperm(num, generator=draw)]
    ids = pairs.image_ids[:, None].expand(num, 5).reshape(-1)
    several = replace(pairs, text=captions.transpose(0, 1).reshape(-1, 64), text_ids=ids)
    figures = mixture_figures(several)
    assert figures["health/matched_share_low"] <= 0.2 <= figures["health/matched_share_high"]
    assert diagnose(several).verdict == "shuffled_pairs"


def test_healthy_pairs_say_what_so_many_may_hide():
    few, many = (diagnose(healthy(0.5)(num, 64, 0)) for num in (40, 400))
    assert "which only 64 pairs and more can show" in few.would_change
    assert "of which" in many.would_change
