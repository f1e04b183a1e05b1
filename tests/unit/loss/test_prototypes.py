"""Clustering of the images and the loss against the clusters."""

import math

import pytest
import torch
import torch.nn.functional as F

from mmscale.contracts import Prototypes
from mmscale.errors import ConfigError
from mmscale.loss.prototypes import cluster, concentrations, kmeans, prototypes
from mmscale.parallel.peers import Alone


def clouds(num_clouds=6, size=30, spread=0.02):
    generator = torch.Generator().manual_seed(3)
    centres = F.normalize(torch.randn(num_clouds, 16, generator=generator), dim=1)
    noise = spread * torch.randn(num_clouds * size, 16, generator=generator)
    return F.normalize(centres.repeat_interleave(size, 0) + noise, dim=1)


def test_kmeans_finds_clouds_the_same_each_time():
    rows = clouds()
    centres, assigned = kmeans(rows, 6, seed=0)
    again = kmeans(rows, 6, seed=0)
    assert torch.equal(centres, again[0])
    assert torch.equal(assigned, again[1])
    groups = assigned.view(6, 30)
    assert (groups == groups[:, :1]).all()
    assert len(groups[:, 0].unique()) == 6


def test_kmeans_is_a_fixed_point_no_worse_than_sklearns():
    sklearn = pytest.importorskip("sklearn.cluster")
    generator = torch.Generator().manual_seed(5)
    rows = F.normalize(torch.randn(400, 8, generator=generator), dim=1)

    def inertia(centres):
        return float(torch.cdist(rows, centres).min(1).values.pow(2).sum())

    ours = inertia(kmeans(rows, 12, seed=1, iterations=100)[0])
    theirs = sklearn.KMeans(12, n_init=1, random_state=0).fit(rows.numpy()).inertia_
    assert ours < 1.05 * theirs


def test_kmeans_with_more_clusters_than_distinct_rows_still_ends():
    rows = torch.eye(3).repeat(4, 1)
    centres, assigned = kmeans(rows, 5, seed=0)
    assert centres.isfinite().all()
    torch.testing.assert_close(centres[assigned], rows)


def test_clusters_are_looked_up_by_image_in_any_order():
    rows = clouds()
    ids = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)) * 7
    found = cluster(rows, ids, 6, 0.2, seed=0)
    order = torch.tensor([5, 100, 31])
    wanted = kmeans(rows[ids.argsort()], 6, 0)[1][ids.argsort().argsort()]
    assert torch.equal(found.of(ids[order]).cluster, wanted[order])
    unknown = torch.tensor([3, 10**9])
    assert found.of(unknown).cluster.tolist() == [-1, -1]
    torch.testing.assert_close(found.centres.norm(dim=1), torch.ones(6))


def test_tight_clusters_have_a_low_temperature():
    rows = torch.cat([clouds(1, 50, 0.01), clouds(1, 50, 0.3), clouds(1, 50, 0.1)])
    assigned = torch.arange(3).repeat_interleave(50)
    centres = torch.stack([rows[assigned == c].mean(0) for c in range(3)])
    phi = concentrations(rows, centres, assigned, 0.2)
    assert phi[0] < phi[2] < phi[1]
    assert phi.mean().item() == pytest.approx(0.2)
    assert concentrations(centres, centres, torch.arange(3), 0.2).tolist() == pytest.approx(
        [0.2] * 3
    )


def test_clustering_needs_more_images_than_clusters():
    with pytest.raises(ConfigError, match="clusters=6"):
        cluster(torch.eye(6), torch.arange(6), 6, 0.2, 0)


def test_loss_is_the_cross_entropy_over_all_clusters():
    centres = torch.eye(3, dtype=torch.float64)
    temperature = torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64)
    one = Prototypes(centres, temperature, torch.tensor([0, 2, -1]))
    image = F.normalize(torch.rand(3, 3, dtype=torch.float64), dim=1)
    text = F.normalize(torch.rand(3, 3, dtype=torch.float64), dim=1)
    total = 0.0
    for rows in (image, text):
        for i, own in ((0, 0), (1, 2)):
            logits = [float(rows[i, k] / temperature[k]) for k in range(3)]
            total += math.log(sum(map(math.exp, logits))) - logits[own]
    found = prototypes(image, text, (one, one), Alone())
    assert found.item() == pytest.approx(total / 4)
