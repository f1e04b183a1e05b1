import numpy as np
import pytest

from mmscale.diagnostics.space import lay_out, procrustes, require_layout
from mmscale.errors import ConfigError


@pytest.fixture
def clusters():
    """Three clusters of 20 points in 10 directions, the widest first."""
    rng = np.random.default_rng(0)
    centres = np.repeat(8 * rng.normal(size=(3, 10)), 20, axis=0)
    return centres + 0.3 * rng.normal(size=(60, 10))


def test_pca_is_the_first_two_directions(clusters):
    assert np.array_equal(lay_out(clusters, "pca"), clusters[:, :2])


@pytest.mark.parametrize(
    ("method", "library"),
    [("tsne", "sklearn"), pytest.param("umap", "umap", marks=pytest.mark.slow)],
)
def test_a_map_keeps_clusters_together_and_repeats_itself(clusters, method, library):
    pytest.importorskip(library)
    places = lay_out(clusters, method)
    assert np.array_equal(places, lay_out(clusters, method))
    distances = np.linalg.norm(places[:, None] - places[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    assert (distances.argmin(axis=1) // 20 == np.arange(60) // 20).all()


@pytest.mark.parametrize("method", ["pca", "tsne", "umap"])
def test_a_map_places_identical_and_very_few_points(method):
    pytest.importorskip({"pca": "numpy", "tsne": "sklearn", "umap": "umap"}[method])
    for rows in (np.zeros((40, 3)), np.eye(4)):
        assert lay_out(rows, method).shape == (len(rows), 2)


def test_a_map_that_was_turned_and_mirrored_is_turned_back():
    points = np.random.default_rng(0).normal(size=(30, 2))
    points -= points.mean(axis=0)
    turned = points @ np.array([[0.6, 0.8], [0.8, -0.6]])
    assert np.allclose(procrustes(turned, points), points)


def test_a_missing_library_is_told(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    require_layout("pca")
    with pytest.raises(ConfigError, match=r"log\.map=tsne needs sklearn.*mmscale\[maps\]"):
        require_layout("tsne")
    with pytest.raises(ConfigError, match="pca, tsne, umap"):
        require_layout("som")
