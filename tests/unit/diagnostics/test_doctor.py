import json
from dataclasses import replace

import pytest
import torch

from mmscale.config.load import load_config
from mmscale.diagnostics.doctor import diagnose, judge
from mmscale.diagnostics.geometry import health_figures
from mmscale.diagnostics.pairs import Pairs, one_to_one
from mmscale.diagnostics.rules import ORDER
from mmscale.errors import DataError
from tests.unit.diagnostics.faulty_embeddings import (
    MODES,
    healthy,
    isotropic,
    rotated,
)


@pytest.mark.parametrize("num", [1, 3, 31])
def test_fewer_than_32_distinct_images_are_too_few_samples(num):
    diagnosis = diagnose(healthy(0.2)(num, 32, 0))
    assert diagnosis.verdict == "too_few_samples"
    assert diagnosis.also == ()
    assert f"{num} distinct images" in diagnosis.causes[0]


def test_five_captions_do_not_make_more_images():
    pairs = healthy(0.2)(20, 32, 0)
    five = replace(pairs, text=pairs.text.repeat(5, 1), text_ids=pairs.text_ids.repeat(5))
    assert diagnose(five).verdict == "too_few_samples"


def test_dead_tower_names_the_side_and_its_settings():
    for side, component in (("image", "vision"), ("text", "text")):
        diagnosis = diagnose(MODES[f"dead {side} tower"][1](128, 64, 0))
        assert f"The {side} tower" in diagnosis.causes[0]
        assert f"optim.lr_scale.{component}=0.1" in diagnosis.remedies
        assert diagnosis.also == ("unaligned",)


def test_where_a_tower_died_is_told_by_its_features():
    pairs = MODES["dead text tower"][1](128, 64, 0)
    alive, gone = torch.randn(128, 32), torch.ones(128, 32)
    head = diagnose(replace(pairs, backbone_image=alive, backbone_text=alive))
    tower = diagnose(replace(pairs, backbone_image=alive, backbone_text=gone))
    assert head.verdict == tower.verdict == "dead_tower"
    assert "head after it" in head.causes[0]
    assert "look at its tokens" in tower.causes[0]


def test_a_tower_of_zeros_is_dead():
    pairs = replace(healthy(0.5)(64, 32, 0), text=torch.zeros(64, 32))
    assert diagnose(pairs).verdict == "dead_tower"


def test_without_features_a_space_that_no_order_fits_is_unaligned():
    for make in (rotated, isotropic):
        diagnosis = diagnose(make(256, 64, 0))
        assert diagnosis.verdict == "unaligned"
        assert "shuffled" in diagnosis.causes[0]
        assert "cannot be told apart" in diagnosis.causes[0]


def test_backbone_features_tell_unaligned_from_shuffled_pairs():
    pairs = isotropic(256, 64, 0)
    features = healthy(0.5)(256, 96, 1)
    paired = replace(pairs, backbone_image=features.image, backbone_text=features.text)
    broken = replace(paired, backbone_text=features.text.roll(1, dims=0))
    assert "the pairs are right" in diagnose(paired).causes[0]
    assert diagnose(broken).verdict == "shuffled_pairs"
    assert diagnose(broken).also == ("unaligned",)
    assert "backbone_cka_z" in diagnose(paired).evidence


def test_a_diagnosis_is_json_with_the_contracts_keys():
    content = json.loads(json.dumps(diagnose(isotropic(128, 64, 0)).to_json()))
    assert list(content) == [
        "verdict",
        "also",
        "confidence",
        "evidence",
        "causes",
        "remedies",
        "pairs",
        "would_change",
    ]
    assert content["evidence"].keys() >= {"auc_centred", "delta_z"}
    assert all(isinstance(value, float) for value in content["evidence"].values())


def test_every_remedy_is_a_setting_that_loads(tmp_path):
    remedies = {word for _, make in MODES.values() for word in diagnose(make(128, 64, 0)).remedies}
    assert remedies
    run = tmp_path / "run.yaml"
    run.write_text("data: {train: shards}")
    for word in remedies:
        load_config([str(run), word])


def test_every_rule_has_a_position_in_the_order():
    assert ORDER[0] == "too_few_samples"
    assert ORDER[-1] == "healthy"


def test_a_narrow_cone_that_tells_its_inputs_apart_is_not_dead():
    figures = health_figures(healthy(0.5)(500, 64, 0)) | {
        "health/variance_image": 0.03,
        "health/variance_text": 0.5,
        "health/column_share": 0.8,
        "health/cka_z": 50.0,
    }
    assert judge(figures).verdict == "healthy"
    assert judge(figures | {"health/variance_image": 0.001}).verdict == "dead_tower"
    assert judge(figures | {"health/variance_text": 0.02}).verdict == "complete_collapse"


def test_the_doctor_refuses_embeddings_that_are_not_finite():
    pairs = isotropic(64, 16, 0)
    pairs.image[0, 0] = torch.inf
    with pytest.raises(DataError, match="image embeddings"):
        diagnose(pairs)


def test_one_to_one_keeps_features_beside_their_rows():
    pairs = isotropic(40, 8, 0)
    doubled = Pairs(
        pairs.image,
        pairs.text.flip(0),
        pairs.image_ids,
        pairs.text_ids.flip(0),
        backbone_image=pairs.image * 2,
        backbone_text=pairs.text.flip(0) * 3,
    )
    sample = one_to_one(doubled)
    assert torch.equal(sample.text, pairs.text)
    assert torch.equal(sample.backbone_image, pairs.image * 2)
    assert torch.equal(sample.backbone_text, pairs.text * 3)
