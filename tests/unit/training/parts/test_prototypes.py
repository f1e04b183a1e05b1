"""Clusters of an epoch: of the latest row of each image, remembered, and restored exactly."""

import pytest
import torch
import torch.nn.functional as F

from mmscale.config.loss import LossConfig
from mmscale.contracts import World
from mmscale.errors import ConfigError
from mmscale.loss.prototypes import cluster
from mmscale.loss.supervised import NO_LABEL
from mmscale.parallel.peers import Alone
from mmscale.training.parts.prototypes import EpochClusters

STEPS, WIDTH = 4, 5


def made(images=40, **term):
    terms = [{"kind": "prototypes", "clusters": [3, 6], "temperature": 0.3, **term}]
    settings = LossConfig.model_validate({"terms": terms}).terms[0]
    return EpochClusters(settings, images, STEPS, 7, World(), Alone(), torch.device("cpu"))


def batch(step, rows=16):
    """Rows of a global batch: some images twice, each step others."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(100, 140, (rows,), generator=generator)
    return F.normalize(torch.randn(rows, WIDTH, generator=generator), dim=1), ids


def run(clusters, steps):
    for step in steps:
        clusters.cluster_anew(step)
        clusters.add(*batch(step))
    return clusters


def tensors(clusters):
    return {tensor.name.removeprefix("prototypes."): tensor.value for tensor in clusters.tensors()}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_an_epochs_end_clusters_the_latest_row_of_each_image():
    clusters = run(made(), range(STEPS))
    assert clusters.of(torch.tensor([101])) == ()
    clusters.cluster_anew(STEPS)
    latest = {}
    for step in range(STEPS):
        for row, identity in zip(*batch(step), strict=True):
            latest[int(identity)] = row
    ids = torch.tensor(sorted(latest))
    rows = torch.stack([latest[identity] for identity in sorted(latest)])
    for found, count in zip(clusters.of(ids), (3, 6), strict=True):
        assert found.centres.shape == (count, WIDTH)
        assert found.temperature.mean().item() == pytest.approx(0.3)
        # Rows stand in another order there, so the first centres are others: the same clusters up
        # to what k-means finds. Each row is in the cluster whose mean points its way.
        means = torch.stack([rows[found.cluster == c].mean(0) for c in range(count)])
        torch.testing.assert_close(F.normalize(means), found.centres)
        assert torch.equal(torch.cdist(rows, means).argmin(1), found.cluster)
    unknown = clusters.of(torch.tensor([99, 101, 500]))[0].cluster
    assert (unknown == NO_LABEL).tolist() == [True, False, True]


def test_clusters_started_within_an_epoch_wait_for_a_whole_epoch():
    clusters = run(made(), range(STEPS - 1, 2 * STEPS))
    clusters.cluster_anew(2 * STEPS)
    assert clusters.of(torch.tensor([101]))
    early = run(made(), range(STEPS - 1, STEPS + 1))
    assert early.of(torch.tensor([101])) == ()


def test_clusters_stay_for_an_epoch_and_change_with_the_next():
    clusters = run(made(), range(STEPS + 1))
    first = tensors(clusters)["0.centres"]
    assert torch.equal(tensors(run(clusters, range(STEPS + 1, 2 * STEPS)))["0.centres"], first)
    clusters.cluster_anew(2 * STEPS)
    assert not torch.equal(tensors(clusters)["0.centres"], first)


def test_clusters_do_not_depend_on_the_order_of_images():
    """Ranks that were restored hold rows in another order than those that saw them come."""
    rows, ids = batch(0, 30)
    wanted = cluster(rows, ids * 1000 + torch.arange(30), 4, 0.2, seed=3)
    order = torch.randperm(30)
    again = cluster(rows[order], (ids * 1000 + torch.arange(30))[order], 4, 0.2, seed=3)
    for name in ("centres", "temperature", "ids", "cluster"):
        assert torch.equal(getattr(wanted, name), getattr(again, name))


@pytest.mark.parametrize("at", [1, STEPS, STEPS + 2])
def test_restored_clusters_continue_as_uninterrupted_ones(at):
    straight = run(made(), range(2 * STEPS + 1))
    before, after = run(made(), range(at)), made()
    after.restore({name: value.clone() for name, value in tensors(before).items()})
    assert_equal(tensors(after), tensors(before))
    assert_equal(tensors(run(after, range(at, 2 * STEPS + 1))), tensors(straight))


def test_not_more_images_than_clusters_is_told_before_the_first_step():
    with pytest.raises(
        ConfigError, match=r"clusters=6 needs more images than the 6 of data\.train"
    ):
        made(images=6)
