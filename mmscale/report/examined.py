"""The page of `mmscale examine`: verdicts, how the pairs fit, and examples with their pictures."""

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import PercentFormatter

from mmscale.data.damage import DamagedSampleError
from mmscale.data.images import ImageReader, PackedImages
from mmscale.data.shards import ShardSet
from mmscale.diagnostics.dataset.verdict import DataVerdict
from mmscale.evaluation.examine import Examined
from mmscale.report.figure import CHANCE_COLOUR, FULL_WIDTH, IMAGE_COLOUR, data_uri, drawing
from mmscale.report.found import small_picture
from mmscale.report.template import write_html

_SHOWN = 12
_HEIGHT = 2.9  # inches
_BINS = np.linspace(-3.5, 4.5, 65)


def write_examined(
    path: Path, examined: Examined, shards: ShardSet, held_out: Mapping[str, ShardSet], data: str
) -> None:
    """Draw what was found.

    Args:
        path: The page.
        examined: What was found.
        shards: The set, from which the pictures are read.
        held_out: Evaluation sets by name, whose pictures stand beside those of a leak.
        data: Name of the set.
    """
    with closing(PackedImages(shards).reader()) as reader:
        shown = [_shown(verdict, reader, held_out) for verdict in examined.verdicts]
    write_html(
        path, "examined.html", verdicts=shown, examined=examined, data=data, picture=_fit(examined)
    )


def _shown(
    verdict: DataVerdict, reader: ImageReader, held_out: Mapping[str, ShardSet]
) -> dict[str, Any]:
    partners = PackedImages(held_out[verdict.held_out or ""]) if _is_leak(verdict) else None
    others = partners.reader() if partners else reader
    try:
        cards = [
            {
                "key": example.key,
                "what": example.what,
                "partner": example.partner,
                "picture": _picture(reader, example.place),
                "beside": None
                if example.partner_place is None
                else _picture(others, example.partner_place),
            }
            for example in verdict.examples[:_SHOWN]
        ]
    finally:
        if partners:
            others.close()
    return {"verdict": verdict, "cards": cards}


def _is_leak(verdict: DataVerdict) -> bool:
    return verdict.verdict == "leakage"


def _picture(reader: ImageReader, place: int) -> str | None:
    try:
        image = reader.read(place)
    except DamagedSampleError:
        return None
    return small_picture(image.content, image.key)


def _fit(examined: Examined) -> str | None:
    """How pairs stand among random ones, and how as many random ones would."""
    if examined.fit is None or examined.fit.deviates is None:
        return None
    values = examined.fit.deviates.numpy().clip(_BINS[0], _BINS[-1])
    with drawing(FULL_WIDTH, _HEIGHT) as figure:
        axes = figure.subplots()
        weights = np.full(len(values), 1 / len(values))
        axes.hist(
            values, _BINS.tolist(), weights=weights, color=IMAGE_COLOUR, label="pairs of the set"
        )
        middle = (_BINS[1:] + _BINS[:-1]) / 2
        bell = np.exp(-(middle**2) / 2) / np.sqrt(2 * np.pi) * np.diff(_BINS)
        axes.plot(middle, bell, color=CHANCE_COLOUR, label="random pairings")
        axes.set_xlabel("standing among random pairings (deviations)")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.legend(loc="upper left")
        return data_uri(figure)
