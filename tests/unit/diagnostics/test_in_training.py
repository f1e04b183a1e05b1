"""What a run knows of its own training pairs turns a verdict, or its causes."""

from dataclasses import replace

import torch

from mmscale.diagnostics.doctor import InTraining, diagnose
from tests.unit.diagnostics.faulty_embeddings import (
    at_scale,
    healthy,
    isotropic,
    sharp,
    weak,
    with_features,
)

KNOWN_BY_HEART = InTraining(pairs=128, auc=1.0, loss_progress=0.99, backbone_cka_z=50.0)


def test_memorised_training_pairs_with_weak_held_out_ones_are_overfit():
    for seed in range(5):
        pairs = at_scale(weak, 14.3)(512, 256, seed)
        assert diagnose(pairs).healthy
        assert diagnose(pairs, KNOWN_BY_HEART).verdict == "overfit"
        assert diagnose(pairs, replace(KNOWN_BY_HEART, loss_progress=0.4)).healthy


def test_held_out_pairs_known_as_well_are_no_overfit():
    pairs = at_scale(sharp, 14.3)(512, 256, 0)
    assert diagnose(pairs, KNOWN_BY_HEART).healthy


def test_memorised_wrong_pairs_are_unaligned_and_overfit():
    """A wrong join in the training file, learnt by heart; nothing is known of features."""
    pairs = at_scale(isotropic, 14.3)(512, 256, 0)
    diagnosis = diagnose(pairs, replace(KNOWN_BY_HEART, backbone_cka_z=None))
    assert diagnosis.verdict == "unaligned"
    assert "overfit" in diagnosis.also


def test_only_the_training_pairs_are_mixed_up():
    for seed in range(5):
        pairs = at_scale(with_features(isotropic, True), 14.3)(512, 256, seed)
        assert diagnose(pairs, KNOWN_BY_HEART).verdict == "unaligned"
        mixed = diagnose(pairs, replace(KNOWN_BY_HEART, backbone_cka_z=0.4))
        assert mixed.verdict == "shuffled_pairs"
        assert "Only the training pairs are mixed up" in mixed.causes[0]


def test_a_healthy_space_is_not_blamed_for_noisy_training_features():
    pairs = at_scale(with_features(healthy(0.5), True), 14.3)(512, 256, 0)
    assert diagnose(pairs, replace(KNOWN_BY_HEART, backbone_cka_z=0.4, loss_progress=0.5)).healthy


def test_weights_without_a_gradient_are_the_first_cause():
    still = ("scale.log_scale", "head.image.weight", "head.text.weight")
    diagnosis = diagnose(isotropic(128, 64, 0), replace(KNOWN_BY_HEART, still=still))
    assert "No gradient has moved head.image.weight, head.text.weight:" in diagnosis.causes[0]


def test_a_probe_line_is_read_back():
    lines = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "health/pairs": 64.0, "health/auc": 0.7, "health/loss_progress": 0.3},
        {"step": 3, "health/pairs": 64.0, "health/auc": 0.8, "health/loss_progress": None},
    ]
    assert InTraining.last_of(lines) == InTraining(64, 0.7, 0.3)
    assert InTraining.last_of(lines[:1]) is None


def test_complete_collapse_names_the_tower_whose_features_do_not_vary():
    num = 128
    point = torch.nn.functional.normalize(torch.ones(1, 32), dim=1).repeat(num, 1)
    pairs = replace(
        isotropic(num, 32, 0),
        image=point,
        text=point,
        backbone_image=torch.ones(num, 8),
        backbone_text=torch.randn(num, 8),
    )
    diagnosis = diagnose(pairs)
    assert diagnosis.verdict == "complete_collapse"
    assert "The image tower's own features are the same" in diagnosis.causes[0]
