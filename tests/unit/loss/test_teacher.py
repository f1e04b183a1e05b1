"""Distillation from a teacher against torch's own losses, and what it refuses."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mmscale.config.load import validate
from mmscale.config.values import whole_steps
from mmscale.contracts import START, Taught
from mmscale.errors import ConfigError
from mmscale.loss.contrast import PairRows
from mmscale.loss.teacher import affinity, feature
from mmscale.loss.term import Given, compute
from mmscale.parallel.peers import Alone
from tests.unit.loss.cases import IDS, leaves, made_up, term


@pytest.fixture
def rows():
    leaf = {key: value.requires_grad_() for key, value in leaves(IDS).items()}
    return leaf, made_up(leaf, IDS)


def test_affinity_is_the_divergence_of_two_softmaxes_both_ways(rows):
    leaf, seen = rows
    theirs = seen.teachers["wider"]
    pairs = PairRows(seen.image.unit, seen.text.unit, IDS, Alone())
    found = affinity(pairs, (theirs.image, theirs.text), seen.scale, theirs.scale)
    ours = seen.scale * seen.image.unit @ seen.text.unit.T
    target = theirs.scale * theirs.image @ theirs.text.T
    ways = ((ours, target), (ours.T, target.T))
    divergences = [
        F.kl_div(own.log_softmax(1), to.log_softmax(1), reduction="batchmean", log_target=True)
        for own, to in ways
    ]
    wanted = sum(divergences) / 2
    entropy = sum(torch.special.entr(to.softmax(1)).sum(1).mean() for _, to in ways) / 2
    torch.testing.assert_close(found.loss, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.entropy, entropy, rtol=1e-12, atol=0)
    leafs = [leaf[name] for name in ("image", "text", "scale")]
    for got, want in zip(
        torch.autograd.grad(found.loss, leafs, retain_graph=True),
        torch.autograd.grad(wanted, leafs),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-14)


def test_feature_is_the_mean_squared_error_and_twice_the_cosine_distance(rows):
    _, seen = rows
    ours, theirs = (seen.image.unit, seen.text.unit), seen.teachers["as wide"]
    pairs = list(zip(ours, (theirs.image, theirs.text), strict=True))
    found = feature(ours, (theirs.image, theirs.text))
    by_error = sum(F.mse_loss(own, to) for own, to in pairs) * ours[0].shape[1] / 2
    by_angle = sum((2 - 2 * F.cosine_similarity(own, to)).mean() for own, to in pairs) / 2
    torch.testing.assert_close(found, by_error)
    torch.testing.assert_close(found, by_angle)


def test_temperatures_of_its_own_take_the_place_of_both_scales(rows):
    _, seen = rows
    given = Given(seen, Alone(), lambda ramp: ramp.at(1, whole_steps))
    own = compute(term("teacher own temperatures"), given).loss
    taught = replace(seen.teachers["wider"], scale=torch.tensor([10.0], dtype=torch.float64))
    same = replace(seen, scale=torch.tensor([5.0]).double(), teachers={"wider": taught})
    torch.testing.assert_close(own, compute(term("teacher"), replace(given, rows=same)).loss)
    assert not torch.isclose(own, compute(term("teacher"), given).loss)


def test_an_anchor_is_a_teacher_that_is_the_start(rows):
    _, seen = rows
    given = Given(seen, Alone(), lambda ramp: ramp.at(1, whole_steps))
    start = replace(given, rows=replace(seen, teachers={"as wide": seen.teachers[START]}))
    assert compute(term("anchor"), given).loss == compute(term("teacher feature"), start).loss
    same = Taught(seen.image.unit, seen.text.unit, seen.scale)
    still = replace(given, rows=replace(seen, teachers={START: same}))
    for name in ("anchor", "anchor affinity"):
        assert compute(term(name), still).loss.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "data", "said"),
    [
        ({}, {}, r"loss\.terms\.0\.model is not set: it has no default \(`hf:NAME_OR_PATH`"),
        ({"model": "hf:x", "form": "logits"}, {}, r"loss\.terms\.0\.form='logits'"),
        ({"model": "hf:x", "temperature": 0}, {}, r"loss\.terms\.0\.temperature=0"),
        ({"model": "hf:x", "form": "feature", "temperature": 1}, {}, r"form=feature has none"),
        (
            {"model": "hf:$HOME/x"},
            {},
            r"loss\.terms\.0\.model=hf:\$HOME/x: `\$HOME` is not filled in",
        ),
        (
            {"model": "hf:x"},
            {"feature_cache": "folder", "augment": "none"},
            r"with model=hf:x, which encodes the pictures, but data\.feature_cache keeps",
        ),
        ({"model": "hf:x", "cache": "folder"}, {}, r"cache=folder, which with data\.augment=crop"),
        (
            {"model": "hf:x", "cache": "folder"},
            {"augment": "none", "resampled": True},
            r"cache=folder, which needs to know every sample, but data\.resampled=true",
        ),
    ],
)
def test_wrong_settings_are_refused(options, data, said):
    towers = {"vision": {"frozen": True}, "text": {"frozen": True}}
    terms = {"terms": [{"kind": "teacher", **options}]}
    with pytest.raises(ConfigError, match=said):
        validate({"data": {"train": "unused", **data}, "model": towers, "loss": terms})
