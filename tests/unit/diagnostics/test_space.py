import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from mmscale.diagnostics.space import MAP_PAIRS, read_cloud, snapshot
from mmscale.errors import DataError
from tests.unit.diagnostics.faulty_embeddings import healthy, joint_collapse


def written(pairs):
    """A snapshot as a file gives it back."""
    return json.loads(json.dumps(snapshot(pairs), allow_nan=False))


def test_the_eigenvalues_are_those_of_the_covariance():
    pairs = healthy(0.7)(600, 24, 0)
    spectrum = written(pairs)["spectrum"]
    for side, rows in (("image", pairs.image), ("text", pairs.text)):
        values = np.linalg.eigvalsh(np.cov(rows.double().numpy().T, bias=True))[::-1]
        ranks = np.array(spectrum[side]["ranks"])
        assert ranks[[0, 1, 2, -1]].tolist() == [1, 2, 3, 24]
        assert np.allclose(spectrum[side]["values"], values[ranks - 1], rtol=1e-3)


def test_the_cloud_keeps_the_distances_of_its_points():
    """In few directions nothing is cut away; fp16 rounds."""
    pairs = healthy(0.7)(150, 16, 0)
    cloud = read_cloud(written(pairs)["cloud"])
    assert cloud.ids == pairs.image_ids.tolist()
    kept = torch.tensor(np.concatenate([cloud.image, cloud.text]))
    given = torch.cat([pairs.image, pairs.text]).double()
    assert torch.allclose(torch.cdist(kept, kept), torch.cdist(given, given), atol=5e-3)
    variances = kept.var(dim=0)
    assert (variances.diff() <= 1e-6).all()
    assert cloud.shown == pytest.approx(float(variances[:2].sum() / variances.sum()), rel=1e-2)


def test_a_large_set_is_thinned_alike_each_time():
    pairs = healthy(0.7)(1500, 64, 0)
    first, second = (read_cloud(written(pairs)["cloud"]) for _ in range(2))
    assert len(first.ids) == MAP_PAIRS
    assert first.ids == second.ids
    assert np.array_equal(first.image, second.image)
    assert len(json.dumps(snapshot(replace(pairs, backbone_image=None)))) < 60_000


def test_the_cloud_of_collapsed_rows_is_one_point():
    cloud = read_cloud(written(joint_collapse(0.0)(64, 16, 0))["cloud"])
    assert np.allclose(cloud.image, 0, atol=1e-3)


def test_too_few_pairs_leave_the_histogram_only():
    assert set(written(healthy(0.7)(3, 16, 0))) == {"similarity"}


@pytest.mark.parametrize(
    "damage",
    [
        {"ids": None},
        {"ids": [1, 2, 3]},
        {"rows": "%%%"},
        {"rows": np.full(64, np.nan, "<f2").tobytes().hex()},
        {"shown": "much"},
    ],
)
def test_a_damaged_cloud_is_told(damage):
    content = written(healthy(0.7)(64, 16, 0))["cloud"] | damage
    with pytest.raises(DataError, match="cannot be read"):
        read_cloud(content)
    with pytest.raises(DataError, match="cannot be read"):
        read_cloud({})
