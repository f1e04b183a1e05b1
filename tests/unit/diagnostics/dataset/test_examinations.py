"""Verdicts on pairs without a model: planted faults are found, sound pairs pass."""

import io
import itertools
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageOps

from mmscale.diagnostics.dataset.captions import (
    MANY_IMAGES,
    cut_captions,
    language_mix,
    repeated_captions,
    script_of,
)
from mmscale.diagnostics.dataset.copies import (
    SIDE,
    Pair,
    false_negative_rate,
    groups_of,
    same_pictures,
)
from mmscale.diagnostics.dataset.images import broken_images, leakage, near_duplicates
from mmscale.diagnostics.dataset.verdict import Looks, wilson
from mmscale.evaluation.examine import examine, grey_of

NUM = 60


def photograph(seed: int) -> Image.Image:
    """Light and shade at all sizes, as of a photograph: amplitudes fall as frequencies rise."""
    draws = np.random.default_rng(seed)
    picture = sum(
        np.asarray(
            Image.fromarray(draws.normal(size=(side, side)).astype(np.float32)).resize(
                (160, 120), Image.Resampling.BICUBIC
            )
        )
        / side**0.5
        for side in (3, 6, 12, 24)
    )
    return Image.fromarray((128 + 50 * picture).clip(0, 255).astype(np.uint8)).convert("RGB")


def encoded(image: Image.Image, quality: int = 90) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def cropped(image: Image.Image) -> Image.Image:
    """A tenth of either side gone, most of it on the right and below."""
    return image.crop((5, 3, 149, 111))


CHANGES = {
    "encoded anew": lambda image: image.resize((100, 75)),
    "mirrored": ImageOps.mirror,
    "cropped": cropped,
    "mirrored and cropped": lambda image: cropped(ImageOps.mirror(image)),
}


def looks_of(contents: list[bytes], captions: list[tuple[str, ...]] | None = None) -> Looks:
    greys, faults = zip(*map(grey_of, contents), strict=True)
    return Looks(
        [f"{row:04d}" for row in range(len(contents))],
        np.arange(len(contents)),
        np.arange(len(contents)),
        contents,
        list(faults),
        np.stack(greys),
        captions or [(f"picture {row}",) for row in range(len(contents))],
    )


@pytest.fixture(scope="module")
def sound() -> Looks:
    return looks_of([encoded(photograph(seed)) for seed in range(NUM)])


def test_different_photographs_are_no_copies_and_a_sound_set_has_no_verdict(sound):
    assert same_pictures(sound.greys, sound.digests) == []
    examined = examine(sound, {}, batch=64)
    assert examined.verdicts == ()
    assert examined.ceiling.t2i_r1 == examined.ceiling.i2t_r1 == 100


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_picture_is_found_in_the_other_set(sound, name):
    held_out = looks_of(
        [encoded(CHANGES[name](photograph(seed)), 60) for seed in range(5)]
        + [encoded(photograph(1000 + seed)) for seed in range(15)]
    )
    (verdict,) = examine(sound, {"": held_out}, batch=64).verdicts
    assert verdict.verdict == "leakage"
    assert verdict.share == 5 / 20
    assert {(one.key, one.partner) for one in verdict.examples} == {
        (f"{row:04d}", f"{row:04d}") for row in range(5)
    }


def test_copies_within_a_set_count_unless_they_share_an_id(sound):
    twice = looks_of(
        [encoded(photograph(seed)) for seed in range(20)]
        + [encoded(ImageOps.mirror(photograph(seed))) for seed in range(4)]
    )
    pairs = same_pictures(twice.greys, twice.digests)
    verdict = near_duplicates(twice, pairs, batch=12)
    assert verdict is not None
    assert verdict.share == 8 / 24
    # The only copy of 8 of 24 images is among 11 of the other 23.
    assert verdict.evidence["false_negative_rate"] == pytest.approx(8 / 24 * 11 / 23)
    ids = np.concatenate([np.arange(20), np.arange(4)])
    assert near_duplicates(replace(twice, ids=ids), pairs, batch=12) is None
    assert verdict.leave_out == (20, 21, 22, 23)


def test_a_mask_of_copies_leaves_the_ids_of_those_that_stay(sound):
    """Row 2 is a copy of row 1, and has the id of row 0, which is what row 1 is a copy of."""
    pairs = [Pair(0, 1, 1.0), Pair(1, 2, 1.0)]
    ids = np.array([7, 8, 7, *range(100, 157)])
    verdict = near_duplicates(replace(sound, ids=ids), pairs, batch=12)
    assert verdict is not None
    assert verdict.leave_out == (8,)


def test_the_false_negative_rate_is_the_mean_over_all_batches():
    sizes, batch = [3, 2, 1, 1, 1], 4
    group = [number for number, size in enumerate(sizes) for _ in range(size)]
    batches = list(itertools.combinations(group, batch))
    met = sum(sum(rows.count(one) > 1 for one in rows) for rows in batches)
    assert false_negative_rate(sizes, batch) == pytest.approx(met / (batch * len(batches)))
    assert false_negative_rate(sizes, 1000) == pytest.approx(5 / 8)


def test_equal_bytes_are_copies_whatever_they_show():
    blank = np.zeros((3, SIDE, SIDE), np.uint8)
    pairs = same_pictures(blank, [b"a", b"b", b"a"])
    assert pairs == [Pair(0, 2, 1.0)]
    assert groups_of(3, pairs) == [0, 1, 0]


def test_images_that_show_nothing_are_named_with_the_reason(sound):
    faulty = looks_of(
        [
            encoded(photograph(0)),
            b"no image",
            encoded(photograph(1))[:400],
            encoded(Image.new("RGB", (64, 64), (9, 9, 9))),
            encoded(photograph(2).resize((200, 20))),
            encoded(photograph(3).resize((1, 1))),
        ]
    )
    verdict = broken_images(faulty)
    assert verdict is not None
    assert verdict.share == 5 / 6
    reasons = [one.what for one in verdict.examples]
    assert [one.key for one in verdict.examples] == [f"{row:04d}" for row in range(1, 6)]
    assert "cannot be decoded" in reasons[0]
    assert "cannot be decoded" in reasons[1]
    assert reasons[2:] == ["it is blank", "it is a strip of 200 x 20 pixels", "it is 1 x 1 pixels"]
    assert broken_images(sound) is None
    assert verdict.leave_out == (1, 2, 3, 4, 5)


def test_captions_of_many_images_are_told_from_chance(sound):
    template = ["A  Photo"] * MANY_IMAGES + ["a photo"]
    captions = [(words,) for words in template + [f"picture {row}" for row in range(49)]]
    set_of = replace(sound, captions=captions)
    verdict = repeated_captions(set_of)
    assert verdict is not None
    assert verdict.share == 11 / 60
    assert [one.what for one in verdict.examples] == ["a photo"]
    assert repeated_captions(replace(sound, captions=captions[2:])) is None


def test_captions_longer_than_the_tower_takes_are_counted_token_by_token(sound):
    fits, too_long = "w " * 8, "w " * 9
    captions = [(fits.strip(),)] * 9 + [(too_long.strip(),)]
    set_of = replace(sound, captions=captions)
    verdict = cut_captions(set_of, lambda caption: len(caption.split()) + 2, 10)
    assert verdict is not None
    assert verdict.share == 0.1
    assert verdict.evidence["longest"] == 11
    assert cut_captions(replace(sound, captions=captions[:9]), len, 10_000) is None


def test_captions_in_another_script_are_counted_and_a_few_are_none(sound):
    others = [("собака бежит по снегу",), ("犬が雪の中を走る",), ("Ein Hund im Schnee",)]
    verdict = language_mix(replace(sound, captions=[*others, *sound.captions[3:]]))
    assert verdict is not None
    assert verdict.share == 2 / NUM
    assert "Latin 96.7%, Cyrillic 1.7%, Cjk 1.7%" in verdict.sentence
    assert [one.key for one in verdict.examples] == ["0000", "0001"]
    assert language_mix(replace(sound, captions=[*others[1:], *sound.captions[2:]])) is None
    assert language_mix(replace(sound, captions=[("12 + 7",)] * NUM)) is None
    # Most of the letters decide.
    assert script_of("Москва, aka Moscow: столица") == "CYRILLIC"
    assert script_of("a 犬") == "LATIN"


def test_leakage_of_an_image_that_has_two_copies_counts_once(sound):
    pairs = [Pair(0, 0, 1.0), Pair(1, 0, 1.0)]
    assert leakage(sound, sound, []) is None
    verdict = leakage(sound, sound, [*pairs, Pair(2, 1, 1.0)])
    assert verdict is not None
    assert verdict.share == 2 / NUM
    assert verdict.evidence["captions_in_both"] == 1
    assert verdict.leave_out == (0, 1, 2)


def test_each_evaluation_set_has_a_verdict_of_its_own(sound):
    held_out = looks_of([encoded(photograph(seed), 60) for seed in (3, 1000)])
    far = looks_of([encoded(photograph(seed)) for seed in (1001, 1002)])
    (verdict,) = examine(sound, {"far": far, "near": held_out}, batch=64).verdicts
    assert (verdict.held_out, verdict.share, verdict.leave_out) == ("near", 0.5, (3,))
    assert "1 of 2 evaluation images of near show" in verdict.sentence


def test_an_interval_of_a_share_is_wilsons():
    # Of 1 in 10, by the closed form of Wilson 1927.
    assert wilson(1, 10) == pytest.approx((0.01788, 0.40415), abs=1e-4)
    assert wilson(0, 10)[0] == 0
