"""What an embedding space looks like at one moment, small enough to keep, and laid out flat."""

import base64
import importlib.util
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy.typing import NDArray
from torch import Tensor

from mmscale.diagnostics.pairs import Pairs, on_grid, one_to_one, thinned_rows
from mmscale.diagnostics.spectrum import covariance_spectrum
from mmscale.errors import ConfigError, DataError

MAP_PAIRS = 200
# Directions kept of a map's points: what t-SNE and UMAP are usually given.
MAP_DIRECTIONS = 32
SPECTRUM_ROWS = 1024
SPECTRUM_POINTS = 48
FEWEST_PAIRS = 4


@dataclass(frozen=True)
class Cloud:
    """Points of both modalities in the directions of largest variance that they share.

    Attributes:
        ids: Image id of each pair.
        image: One row a pair, centred together with the captions.
        text: Likewise.
        shown: Share of the variance that the first two directions hold.
    """

    ids: list[int]
    image: NDArray[np.float64]
    text: NDArray[np.float64]
    shown: float


def snapshot(pairs: Pairs) -> dict[str, Any]:
    """A moment of the space for JSON, about 30 kB: `similarity`, `spectrum` and `cloud`.

    The last two need `FEWEST_PAIRS`. The same set gives the same images each time.
    """
    moment: dict[str, Any] = {"similarity": similarity_histogram(pairs)}
    sample = one_to_one(pairs, SPECTRUM_ROWS)
    if len(sample.image) >= FEWEST_PAIRS:
        moment["spectrum"] = {
            "image": _spectrum(sample.image.double()),
            "text": _spectrum(sample.text.double()),
        }
        moment["cloud"] = _cloud(one_to_one(pairs, MAP_PAIRS))
    return moment


def read_cloud(content: Mapping[str, Any]) -> Cloud:
    """The `cloud` of a snapshot.

    Raises:
        DataError: It is not one.
    """
    try:
        ids = [int(number) for number in content["ids"]]
        numbers = np.frombuffer(base64.b64decode(content["rows"], validate=True), "<f2")
        rows = numbers.astype(np.float64).reshape(2, len(ids), -1)
        shown = float(content["shown"])
        if not np.isfinite(rows).all() or rows.shape[2] < 2:
            raise ValueError("points that cannot be placed")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"a cloud of points cannot be read ({error}); remove the file") from error
    return Cloud(ids, rows[0], rows[1], shown)


def _spectrum(rows: Float64[Tensor, "n d"]) -> dict[str, list[float]]:
    """Eigenvalues of the covariance at some ranks, evenly spaced on a logarithmic axis."""
    values = covariance_spectrum(rows)
    places = np.geomspace(1, len(values), SPECTRUM_POINTS).round().astype(int)
    ranks = sorted(set(places.tolist()))
    return {"ranks": ranks, "values": [_short(float(values[rank - 1])) for rank in ranks]}


def _cloud(sample: Pairs) -> dict[str, Any]:
    image, text = sample.image.double(), sample.text.double()
    directions, shown = _principal(torch.cat([image, text]))
    return {
        "ids": sample.image_ids.tolist(),
        "rows": base64.b64encode(directions.numpy().astype("<f2").tobytes()).decode(),
        "shown": _short(shown),
    }


def _principal(rows: Float64[Tensor, "n d"]) -> tuple[Float[Tensor, "n k"], float]:
    """Coordinates along the directions of largest variance, and the first two's share of it."""
    centred = rows - rows.mean(dim=0)
    left, sizes, _ = torch.linalg.svd(centred, full_matrices=False)
    # A singular vector's sign is arbitrary: the same points must give the same picture.
    peaks = left.abs().argmax(dim=0)
    signs = left[peaks, torch.arange(len(sizes))].sign()
    kept = (left * signs * sizes)[:, :MAP_DIRECTIONS]
    if kept.shape[1] < 2:
        kept = torch.nn.functional.pad(kept, (0, 2 - kept.shape[1]))
    total = float(sizes.square().sum())
    return kept, float(sizes[:2].square().sum()) / total if total > 0 else 1.0


def _short(value: float) -> float:
    """Four digits: more cannot be seen."""
    return float(f"{value:.4g}")


BINS = 80
LARGEST_SAMPLE = 512
_CHUNK = 256


def similarity_histogram(pairs: Pairs) -> dict[str, Any]:
    """Counts of cosines of matched and unmatched pairs over the same bins, ready for JSON.

    At most `LARGEST_SAMPLE` distinct images, taken evenly, are compared with their captions and
    those of one another; `images` and `captions` say how many.
    """
    chosen, texts = thinned_rows(pairs, LARGEST_SAMPLE)
    image_ids, text_ids = pairs.image_ids.cpu()[chosen], pairs.text_ids.cpu()[texts]
    images, captions = on_grid(pairs.image.cpu()[chosen]), on_grid(pairs.text.cpu()[texts])
    low, high = _bounds(images, captions)
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64)
    counts = {name: torch.zeros(BINS, dtype=torch.float64) for name in ("matched", "unmatched")}
    for rows, ids in zip(torch.split(images, _CHUNK), torch.split(image_ids, _CHUNK), strict=True):
        similarity = rows @ captions.T
        matched = ids[:, None] == text_ids[None, :]
        for name, cells in (("matched", matched), ("unmatched", ~matched)):
            counts[name] += torch.histogram(similarity[cells], edges).hist
    described = {
        name: {"edges": edges.tolist(), "counts": [int(v) for v in values]}
        for name, values in counts.items()
    }
    return described | {
        "width": pairs.image.shape[1],
        "images": len(images),
        "captions": len(captions),
    }


def _bounds(images: Tensor, captions: Tensor) -> tuple[float, float]:
    """Least and greatest cosine, widened: bins need a width even if all cosines are equal."""
    extremes = [torch.stack((rows @ captions.T).aminmax()) for rows in torch.split(images, _CHUNK)]
    low, high = float(torch.stack(extremes)[:, 0].min()), float(torch.stack(extremes)[:, 1].max())
    return low - 1e-3, high + 1e-3


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


def procrustes(points: Points, onto: Points) -> Points:
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
