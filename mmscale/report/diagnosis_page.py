"""The page of `mmscale doctor --out`: the verdict on each set, its recalls and its space."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmscale.diagnostics.pairs import Pairs
from mmscale.diagnostics.retrieval import recalls
from mmscale.diagnostics.space import snapshot
from mmscale.parallel.peers import Alone
from mmscale.report.page import Plot, space_pictures
from mmscale.report.template import write_html
from mmscale.report.verdicts import Told, told


@dataclass(frozen=True)
class _Set:
    name: str
    told: Told
    recalls: list[tuple[str, list[float]]]
    images: int
    captions: int
    pictures: list[Plot]


def write_diagnoses(
    path: Path, title: str, found: Iterable[tuple[str, Pairs, Mapping[str, Any]]]
) -> None:
    """Write what the doctor says of sets of pairs.

    Args:
        path: The file.
        title: Of the page: the model or the file that was looked at.
        found: Name of each set, which may be empty, its pairs and `Diagnosis.to_json`.
    """
    sets = [_set(name, pairs, diagnosis) for name, pairs, diagnosis in found]
    write_html(path, "diagnosis.html", title=title, sets=sets)


def _set(name: str, pairs: Pairs, diagnosis: Mapping[str, Any]) -> _Set:
    figures = recalls(pairs, Alone())
    rows = [
        (words, [float(figures[f"{way}_r{top}"]) for top in (1, 5, 10)])
        for way, words in (("i2t", "image to text"), ("t2i", "text to image"))
    ]
    pictures = space_pictures([{"step": 0, **snapshot(pairs)}])
    counts = int(figures["images"]), int(figures["captions"])
    return _Set(name, told(diagnosis), rows, *counts, pictures)
