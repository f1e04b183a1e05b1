"""A benchmark's figures: ours against open_clip's in one run, and the limit where one is known.

Each benchmark is a module beside this one, with a `run() -> list[Result]`.
"""

import importlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mmscale.errors import ConfigError
from mmscale.report.metrics import in_columns

BENCHES = ("data", "loss", "step")


@dataclass(frozen=True)
class Result:
    """One figure of ours beside the peer's.

    Attributes:
        name: What was measured.
        metric: `time_s`, `memory_bytes` or `samples_per_second`.
        n: Rows, samples or whatever the figure grows with.
        ranks: Processes that worked together.
        device: Where: `cpu`, `cuda`, ...
        ours: Our figure.
        peer: The peer's; None where it is not there or would not fit.
        ratio: ours / peer.
        limit: The best that is possible, where it is known.
    """

    name: str
    metric: str
    n: int
    ranks: int
    device: str
    ours: float
    peer: float | None
    ratio: float | None
    limit: float | None


def run(name: str, device: str | None = None) -> list[Result]:
    """Measure; on one device, where one is named.

    Raises:
        ConfigError: There is no such bench, or the peers are not installed.
    """
    if name not in BENCHES:
        raise ConfigError(f"bench {name}: there is no such bench; choose of {', '.join(BENCHES)}")
    if device is not None and name != "loss":
        raise ConfigError(f"bench {name} has no --device; leave it out")
    peers_folder()
    module = importlib.import_module(f"tools.bench.{name}")
    results: list[Result] = module.run() if device is None else module.run(device=device)
    return results


def peers_folder() -> Path:
    """Where `make peers` put what open_clip's trainer needs; for PYTHONPATH of a process of it.

    Raises:
        ConfigError: It has not been run.
    """
    folder = Path(sys.prefix) / "peers"
    if not (folder / "webdataset").is_dir():
        raise ConfigError(
            f"a benchmark measures against open_clip's own trainer, which {folder} does not "
            "hold; run `make peers` (with the VENV of this environment)"
        )
    return folder


def as_json(results: Sequence[Result]) -> dict[str, Any]:
    """Results as `--json` writes them."""
    return {"results": [asdict(result) for result in results]}


def table(results: Sequence[Result]) -> str:
    """Results as aligned text, a line each."""
    names = [field.name for field in fields(Result)]
    rows = [names, *([shown(getattr(result, name)) for name in names] for result in results)]
    return in_columns(rows, left={0, 1, 4})


def shown(value: object) -> str:
    """A figure as tables have it."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
