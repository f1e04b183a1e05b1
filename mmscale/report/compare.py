"""Runs side by side: the settings that differ, and the last recalls with their spread over seeds.

Runs that differ by `run.seed` only are one group. Read by `compare_page.py`, which draws.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mmscale.config.evaluation import MAIN, logged, set_named_in
from mmscale.config.load import read_yaml
from mmscale.errors import ConfigError, DataError
from mmscale.report.metrics import (
    SET_FIGURES,
    Lines,
    in_columns,
    read_metrics,
    set_figures,
    set_names,
)

SEED = "run.seed"
# Settings that leave no trace in what a run learns.
NOT_COMPARED = ("run.", "log.", "checkpoint.")
LONGEST_LABEL = 60
MISSING = "n/a"


@dataclass(frozen=True)
class Run:
    """One run folder: its name among the others, its settings by dotted path, its log."""

    name: str
    folder: Path
    settings: Mapping[str, Any]
    lines: Lines

    @property
    def seed(self) -> Any:
        """The run's seed."""
        return self.settings.get(SEED)

    @cached_property
    def figures(self) -> dict[str, float]:
        """Recalls or accuracies of the last evaluation of each set, percent, as they are logged."""
        found: dict[str, float] = {}
        for name in (MAIN, *set_names(self.lines)):
            told = (set_figures(line, name) for line in reversed(self.lines))
            found |= next((figures for figures in told if figures), {})
        return found

    def figures_of(self, name: str) -> dict[str, float] | None:
        """Those of one set; None without."""
        return {key: v for key, v in self.figures.items() if set_named_in(key) == name} or None

    def last(self, key: str) -> Any:
        """The newest value of a figure, or None."""
        return next((line[key] for line in reversed(self.lines) if key in line), None)


@dataclass(frozen=True)
class Spread:
    """A figure over `n` runs; the sample's standard deviation needs two."""

    mean: float
    std: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + ("" if self.std is None else f" ± {self.std:.1f}")


@dataclass(frozen=True)
class SeedGroup:
    """Runs that differ by their seed only; `label` tells what sets the group apart."""

    label: str
    runs: tuple[Run, ...]

    def values(self, figure: str) -> list[float]:
        """A figure's, of the runs that have it; beside finished runs others do not count."""
        having = [run for run in self.runs if figure in run.figures]
        finished = [run for run in having if run.last("finished")]
        return [run.figures[figure] for run in finished or having]

    def spread(self, figure: str) -> Spread | None:
        """A logged figure over the runs that have it."""
        values = self.values(figure)
        if not values:
            return None
        std = statistics.stdev(values) if len(values) > 1 else None
        return Spread(statistics.fmean(values), std, len(values))


@dataclass(frozen=True)
class Comparison:
    """What was asked to be compared.

    Attributes:
        runs: As they were named.
        differing: Dotted path of each setting that is not the same everywhere, with every run's
            value.
        groups: The runs by configuration, in the order of their first runs.
    """

    runs: tuple[Run, ...]
    differing: Mapping[str, tuple[Any, ...]]
    groups: tuple[SeedGroup, ...]

    @cached_property
    def sets(self) -> dict[str, list[str]]:
        """Logged figures of each evaluation set that any run has; `data.eval` is `main`."""
        found = {key for run in self.runs for key in run.figures}
        names = dict.fromkeys(set_named_in(key) for run in self.runs for key in run.figures)
        first = [MAIN] if MAIN in names or not names else []
        wanted = {
            name: [logged(name, figure) for figure in SET_FIGURES]
            for name in dict.fromkeys([*first, *names])
        }
        return {name: [key for key in keys if key in found] for name, keys in wanted.items()}


def compare(folders: Sequence[Path]) -> Comparison:
    """Read runs and group them.

    Raises:
        ConfigError: Fewer than two runs, or one named twice.
        DataError: A folder holds no run, or a damaged one.
    """
    places = [folder.resolve() for folder in folders]
    if len(places) < 2:
        raise ConfigError("compare: takes two run folders or more; name another run")
    if twice := {str(place) for place in places if places.count(place) > 1}:
        raise ConfigError(f"compare: {', '.join(sorted(twice))} is named twice; name it once")
    runs = tuple(_read(folder, name) for folder, name in zip(folders, _names(places), strict=True))
    differing = _differing(runs)
    return Comparison(runs, differing, _groups(runs, [key for key in differing if key != SEED]))


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """A comparison as `--json` writes it."""
    return {
        "runs": [
            {
                "run": str(run.folder),
                "name": run.name,
                "seed": run.seed,
                "step": run.last("step"),
                "loss": run.last("loss"),
                "verdict": run.last("verdict"),
                "finished": bool(run.last("finished")),
                "recalls": run.figures_of(MAIN),
                "sets": {name: run.figures_of(name) for name in comparison.sets if name != MAIN},
            }
            for run in comparison.runs
        ],
        "differing": {key: list(values) for key, values in comparison.differing.items()},
        "groups": [
            {
                "label": group.label,
                "runs": [run.name for run in group.runs],
                "seeds": [run.seed for run in group.runs],
                "recalls": _spreads(group, comparison.sets.get(MAIN, [])),
                "sets": {
                    name: _spreads(group, keys)
                    for name, keys in comparison.sets.items()
                    if name != MAIN
                },
            }
            for group in comparison.groups
        ],
    }


def _spreads(group: SeedGroup, keys: Sequence[str]) -> dict[str, Any]:
    spreads = {key: group.spread(key) for key in keys}
    return {key: asdict(spread) for key, spread in spreads.items() if spread is not None}


def comparison_table(comparison: Comparison) -> str:
    """A comparison as aligned text: the settings that differ, then the groups' figures by set."""
    settings = setting_table(comparison)
    tables = [
        [[f"{name}, {rows[0][0]}", *rows[0][1:]], *rows[1:]]
        for name, rows in set_tables(comparison).items()
    ]
    told = [in_columns(settings, left=range(len(settings[0]))), *map(in_columns, tables)]
    return "\n\n".join(told)


def setting_table(comparison: Comparison) -> list[list[str]]:
    """The differing settings of every run, heads first; whichever there are more of are rows."""
    heads = ["", *(run.name for run in comparison.runs)]
    rows = [[key, *map(_text, values)] for key, values in comparison.differing.items()]
    cells = [heads, *rows]
    if len(rows) < len(comparison.runs):
        return [list(column) for column in zip(*cells, strict=True)]
    return cells


def set_tables(comparison: Comparison) -> dict[str, list[list[str]]]:
    """The last figures of every group, heads first, by what the set is called."""
    return {
        title_of(name): [
            ["percent, last evaluation", "runs", *map(_head, keys)],
            *(
                [
                    group.label,
                    str(len(group.values(keys[0])) if keys else 0),
                    *(str(group.spread(key) or MISSING) for key in keys),
                ]
                for group in comparison.groups
            ),
        ]
        for name, keys in comparison.sets.items()
    }


def title_of(name: str) -> str:
    """What a set is called where sets have titles."""
    return "data.eval" if name == MAIN else name


def _head(key: str) -> str:
    return key.rpartition("/")[2].replace("_r", " R@").replace("_", " ")


def _read(folder: Path, name: str) -> Run:
    config = folder / "config.yaml"
    if not config.is_file():
        raise DataError(f"{folder}: holds no run (no config.yaml); name a run folder")
    return Run(name, folder, _flat(read_yaml(config)), read_metrics(folder / "metrics.jsonl"))


def _differing(runs: Sequence[Run]) -> dict[str, tuple[Any, ...]]:
    found = {}
    for key in dict.fromkeys(key for run in runs for key in run.settings):
        values = tuple(run.settings.get(key) for run in runs)
        if key.startswith(NOT_COMPARED) and key != SEED:
            continue
        if len(set(map(_text, values))) > 1:
            found[key] = values
    return found


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _names(places: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell all of them apart."""
    longest = max(len(place.parts) for place in places)
    for depth in range(1, longest + 1):
        names = [str(Path(*place.parts[-depth:])) for place in places]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("resolved paths are distinct")


def _groups(runs: Sequence[Run], keys: Sequence[str]) -> tuple[SeedGroup, ...]:
    """Runs with equal values of `keys` together."""
    found: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        found.setdefault(tuple(_text(run.settings.get(key)) for key in keys), []).append(run)
    labels = [
        ", ".join(f"{key}={value}" for key, value in zip(keys, values, strict=True))
        for values in found
    ]
    if any(len(label) > LONGEST_LABEL for label in labels):
        labels = [", ".join(run.name for run in members) for members in found.values()]
    return tuple(
        SeedGroup(label or "all runs", tuple(members))
        for label, members in zip(labels, found.values(), strict=True)
    )


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.6g}"
    return json.dumps(value, sort_keys=True)
