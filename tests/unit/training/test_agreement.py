"""The digest of a global batch's keys does not depend on how the batch is cut."""

import random

from mmscale.training.agreement import _digest, _digest_parts


def test_the_digest_is_a_sum_over_ranks():
    keys = [f"image-{number}#{number % 5}" for number in range(96)]
    whole = _digest(_digest_parts(keys))
    shuffled = random.Random(0).sample(keys, len(keys))
    parts = [_digest_parts(shuffled[start : start + 24]) for start in range(0, 96, 24)]
    assert _digest([sum(part) for part in zip(*parts, strict=True)]) == whole
    assert len(whole) == 16
    assert _digest(_digest_parts([*keys[1:], "image-0#1"])) != whole
