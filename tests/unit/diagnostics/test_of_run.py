"""A run is told nothing before its time, and no remedy that it has."""

from dataclasses import replace

import pytest

from mmscale.config.load import load_config
from mmscale.diagnostics.doctor import InTraining, bare, diagnose
from mmscale.diagnostics.geometry import health_figures
from mmscale.diagnostics.of_run import Course, diagnose_run, in_words, not_yet_set
from mmscale.diagnostics.pairing import pairing_figures
from mmscale.diagnostics.rules import RULES
from mmscale.report.verdicts import TOO_EARLY, in_lines, verdict_named, verdict_of
from tests.unit.diagnostics.faulty_embeddings import (
    dead,
    healthy,
    isotropic,
    joint_collapse,
    mispaired,
    moved,
)


def course(tmp_path, updates, *words, samples=0, epochs=0):
    run = tmp_path / "run.yaml"
    run.write_text("data: {train: shards}")
    return Course(load_config([str(run), *words]), updates, samples, epochs)


@pytest.mark.parametrize(
    ("make", "updates"),
    [(joint_collapse(0.0), 28), (dead("text"), 199), (isotropic, 0), (isotropic, 1)],
)
def test_a_run_of_few_updates_is_too_few_samples_and_says_too_early(tmp_path, make, updates):
    pairs = make(128, 64, 0)
    name = diagnose(pairs).verdict
    diagnosis = diagnose_run(pairs, course(tmp_path, updates))
    assert (diagnosis.verdict, diagnosis.also) == ("too_few_samples", ())
    assert f"Too early to say: {updates} update" in diagnosis.causes[0]
    assert name in diagnosis.causes[1]
    assert diagnosis.evidence["updates"] == updates
    assert verdict_of(diagnosis.to_json()) is TOO_EARLY
    assert TOO_EARLY.tone == "none"
    assert "Too early to say" in in_lines(diagnosis.to_json())[1]


@pytest.mark.parametrize("make", [joint_collapse(0.0), dead("text"), isotropic])
def test_a_run_past_its_grace_gets_its_verdict(tmp_path, make):
    pairs = make(128, 64, 0)
    diagnosis = diagnose_run(pairs, course(tmp_path, 200))
    assert diagnosis.verdict == diagnose(pairs).verdict
    assert verdict_of(diagnosis.to_json()) is verdict_named(diagnosis.verdict)


def test_warmup_is_the_beginning_in_whatever_unit(tmp_path):
    pairs = isotropic(128, 64, 0)
    for words, inside, outside in (
        ("500 steps", {"updates": 499}, {"updates": 500}),
        ("2 epochs", {"updates": 300, "epochs": 1}, {"updates": 300, "epochs": 2}),
        ("64k samples", {"updates": 300, "samples": 63000}, {"updates": 300, "samples": 64000}),
    ):
        early = diagnose_run(pairs, course(tmp_path, inside.pop("updates"), optim(words), **inside))
        assert "warm-up" in early.causes[0]
        late = diagnose_run(
            pairs, course(tmp_path, outside.pop("updates"), optim(words), **outside)
        )
        assert late.verdict == "unaligned"


def optim(warmup):
    return f"optim.warmup={warmup}"


def test_a_warmup_longer_than_the_limit_does_not_delay_the_verdict(tmp_path):
    late = course(tmp_path, 1000, optim("5000 steps"))
    assert diagnose_run(isotropic(128, 64, 0), late).verdict == "unaligned"


def test_healthy_and_shuffled_pairs_are_called_after_few_updates(tmp_path):
    begun = course(tmp_path, 5)
    assert diagnose_run(healthy(0.5)(256, 64, 0), begun).healthy
    for make in (mispaired(healthy(0.5), 0.5), moved(healthy(0.5), lambda text: text.flip(0))):
        assert diagnose_run(make(256, 64, 0), begun).verdict == "shuffled_pairs"


def test_weights_without_a_gradient_are_named_after_few_updates(tmp_path):
    training = InTraining(128, 0.5, 0.0, still=("head.text.weight",))
    diagnosis = diagnose_run(isotropic(128, 64, 0), course(tmp_path, 20), training)
    assert "Too early" in diagnosis.causes[0]
    assert any("No gradient has moved head.text.weight" in cause for cause in diagnosis.causes)


REMEDIES = (
    "negatives.gather=true",
    "optim.clip_norm=1.0",
    "loss.preset=clip",
    "engine.precision=fp32",
    "model.head.standardize=4096",
    "optim.lr=1e-4",
    "optim.weight_decay=0.01",
    "model.vision.weights=pretrained",
    "data.workers=0",
    "data.match=caption",
)


def test_a_remedy_that_is_set_is_not_repeated(tmp_path):
    kept = not_yet_set(REMEDIES, course(tmp_path, 5000).config, 5000)
    assert kept
    for word in REMEDIES[:3]:
        assert word not in kept
    for word in kept:
        again = course(tmp_path, 5000, word)
        assert word not in not_yet_set(REMEDIES, again.config, 5000), word


@pytest.mark.parametrize(
    ("word", "further"),
    [
        ("train.global_batch_size=1024", "train.global_batch_size=2048"),
        ("optim.lr=1e-4", "optim.lr=1e-5"),
        ("optim.warmup=1000 steps", "optim.warmup=3000 steps"),
        ("model.logit_scale.max=50", "model.logit_scale.max=30"),
    ],
)
def test_a_remedy_weaker_than_the_current_setting_is_not_given(tmp_path, word, further):
    assert not_yet_set((word,), course(tmp_path, 5000).config, 5000) == (word,)
    assert not_yet_set((word,), course(tmp_path, 5000, further).config, 5000) == ()


def test_a_warmup_longer_than_the_run_is_not_advised(tmp_path):
    config = course(tmp_path, 0).config
    assert not_yet_set(("optim.warmup=1000 steps",), config, 28) == ()
    assert not_yet_set(("optim.warmup=1000 steps",), config, 5000) != ()


def test_foreign_code_is_advised_in_words_by_every_rule():
    """With either side as the one that fails."""
    pairs = replace(isotropic(128, 64, 0), logit_scale=1.0)
    figures = bare(health_figures(pairs) | pairing_figures(pairs))
    for side in ("image", "text"):
        other = {"image": "text", "text": "image"}[side]
        turned = figures | {
            f"variance_{side}": 0.0,
            f"variance_{other}": 0.5,
            f"participation_{side}": 1.2,
            f"participation_{other}": 40.0,
            "train_loss_progress": 1.0,
            "heldout_loss_progress": 0.1,
        }
        for rule in RULES.values():
            remedies = rule(turned).remedies
            told_in_words = in_words(remedies)
            assert len(told_in_words) == len(remedies)
            assert not any("=" in word.split(" ")[0] for word in told_in_words)
