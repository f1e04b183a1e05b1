"""Both modalities on flat maps at several moments: places of dots for the page to draw."""

from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from mmscale.diagnostics.space import Cloud, lay_out, procrustes, read_cloud
from mmscale.report.examples import Examples
from mmscale.report.space import Moments, spaced

SIZE = 200  # units that a map is wide and high
MOST_SHOWN = 4
_MARGIN = 8
NAMES = {"pca": "PCA", "tsne": "t-SNE", "umap": "UMAP"}


@dataclass(frozen=True)
class Dot:
    """A point on a map.

    Attributes:
        pair: Which of the examples' points it belongs to, -1 if to none.
        x: To the right.
        y: Downwards.
    """

    pair: int
    x: float
    y: float


@dataclass(frozen=True)
class Map:
    """One moment; `shown`: share of the variance on the map, where that can be said."""

    step: int
    shown: float | None
    images: list[Dot]
    captions: list[Dot]


def draw_maps(moments: Moments, examples: Examples, method: str) -> list[Map]:
    """The space at several moments, each map turned so that dots move as little as they can.

    PCA's maps share one scale, so that a space that contracts is seen to; others fill their map.

    Raises:
        DataError: A moment's points cannot be read.
        ConfigError: The method's library is not installed.
    """
    held = [moment for moment in moments if "cloud" in moment]
    clouds = [(moment["step"], read_cloud(moment["cloud"])) for moment in spaced(held, MOST_SHOWN)]
    places = [_places(cloud, method) for _, cloud in clouds]
    for now in reversed(range(len(places) - 1)):
        if clouds[now][1].ids == clouds[now + 1][1].ids:
            places[now] = procrustes(places[now], places[now + 1])
    if method == "pca":
        widest = reduce(max, (float(np.abs(points).max()) for points in places), 0.0)
        placed = [_scaled(points, widest) for points in places]
    else:
        placed = [_filling(points) for points in places]
    numbers = {
        examples.photos[point.photo].id: number for number, point in enumerate(examples.points)
    }
    return [
        _map(step, cloud, points, numbers, method)
        for (step, cloud), points in zip(clouds, placed, strict=True)
    ]


def _places(cloud: Cloud, method: str) -> NDArray[np.float64]:
    return lay_out(np.concatenate([cloud.image, cloud.text]), method)


def _scaled(points: NDArray[np.float64], widest: float) -> NDArray[np.float64]:
    """Points around zero, the widest of all maps at the margin."""
    half = SIZE / 2
    return half + points * ((half - _MARGIN) / widest if widest > 0 else 0.0)


def _filling(points: NDArray[np.float64]) -> NDArray[np.float64]:
    centred = points - (points.max(axis=0) + points.min(axis=0)) / 2
    return _scaled(centred, float(np.abs(centred).max()))


def _map(
    step: int, cloud: Cloud, points: NDArray[np.float64], numbers: dict[int, int], method: str
) -> Map:
    half = len(cloud.ids)
    sides = [
        [
            Dot(
                numbers.get(number, -1 if numbers else place),
                round(float(x), 1),
                round(float(y), 1),
            )
            for place, (number, (x, y)) in enumerate(zip(cloud.ids, side, strict=True))
        ]
        for side in (points[:half], points[half:])
    ]
    return Map(step, cloud.shown if method == "pca" else None, *sides)
