"""Points of many directions on a flat map: PCA, or t-SNE and UMAP by their libraries."""

import importlib.util
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmscale.errors import ConfigError

Points = NDArray[np.float64]

_LIBRARIES = {"pca": None, "tsne": "sklearn", "umap": "umap"}


def require_layout(method: str) -> None:
    """Refuse a way of drawing maps that there is not, or whose library is not installed.

    Raises:
        ConfigError: It is unknown, or its library is missing.
    """
    if method not in _LIBRARIES:
        raise ConfigError(f"a map cannot be drawn by {method}; choose {', '.join(_LIBRARIES)}")
    library = _LIBRARIES[method]
    if library is not None and importlib.util.find_spec(library) is None:
        raise ConfigError(
            f"log.map={method} needs {library}, which is not installed; "
            "run pip install 'mmscale[maps]' or set log.map=pca"
        )


def lay_out(rows: Points, method: str) -> Points:
    """Places of the points, [p 2]; the same each time.

    Args:
        rows: Coordinates along principal directions, the largest first: PCA's map is the first two.
        method: `pca`, `tsne` or `umap`.

    Raises:
        ConfigError: The method's library is not installed.
    """
    require_layout(method)
    # Neighbourhoods are asked of points that have neighbours.
    if method == "pca" or len(rows) < 10 or float(np.ptp(rows)) == 0.0:
        return rows[:, :2]
    return _tsne(rows) if method == "tsne" else _umap(rows)


def aligned(points: Points, onto: Points) -> Points:
    """The points turned and mirrored so that they lie as near as possible to others, row by row.

    Every map may be turned: without this, dots would jump between moments.
    """
    left, _, right = np.linalg.svd((points - points.mean(axis=0)).T @ (onto - onto.mean(axis=0)))
    return points @ (left @ right)


def _tsne(rows: Points) -> Points:
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    perplexity = min(30.0, (len(rows) - 1) / 3)
    # Sums of several threads differ in their last bits, which the descent magnifies.
    with threadpool_limits(1):
        return _plain(TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(rows))


def _umap(rows: Points) -> Points:
    import umap

    with warnings.catch_warnings():
        # It says that a seed costs it its threads.
        warnings.simplefilter("ignore")
        neighbours = min(15, len(rows) - 1)
        return _plain(umap.UMAP(n_neighbors=neighbours, random_state=0).fit_transform(rows))


def _plain(points: Any) -> Points:
    return np.asarray(points, dtype=np.float64)
