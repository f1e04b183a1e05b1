"""The table of rates that a run prints before its first update."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

HEADINGS = ("part", "tensors", "parameters", "lr", "weight decay")


def rates_table(groups: Iterable[Mapping[str, Any]], model: nn.Module) -> list[str]:
    """A line for each group of trained parameters, and one for what is not trained.

    Args:
        groups: Of the optimizer, before an engine cut them.
        model: What they are part of.
    """
    rows = [
        (
            str(group["name"]),
            f"{len(group['names']):,}",
            f"{group['parameters']:,}",
            f"{group['base_lr']:.3g}",
            f"{group['weight_decay']:.3g}",
        )
        for group in groups
    ]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    rows.append(("frozen", f"{len(frozen):,}", f"{sum(_size(p) for p in frozen):,}", "-", "-"))
    widths = [max(map(len, column)) for column in zip(HEADINGS, *rows, strict=True)]
    return [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(v.rjust(w) for v, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in (HEADINGS, *rows)
    ]


def _size(parameter: Any) -> int:
    # Under ZeRO 3 a parameter holds nothing between forwards.
    return int(getattr(parameter, "ds_numel", parameter.numel()))
