"""Tables of figures over seeds, as aligned text and as Markdown."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from mmscale.report.metrics import in_columns

Value: TypeAlias = float | int | str
MISSING = "-"


@dataclass(frozen=True)
class Table:
    """Rows of text under a head; the first column names the rows."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def text(self) -> str:
        """Aligned columns."""
        return in_columns([self.head, *self.rows])

    def markdown(self) -> str:
        """A table of Markdown, figures to the right."""
        rules = ("---", *("---:" for _ in self.head[1:]))
        lines = [self.head, rules, *self.rows]
        return "\n".join(
            "| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in lines
        )


def table_of(entries: Iterable[tuple[str, str, Value]], corner: str = "", digits: int = 1) -> Table:
    """Values by row and column; several of one place (seeds) as mean and spread.

    Args:
        entries: Row, column and value; rows and columns stand as they first come.
        corner: Title of the first column.
        digits: After the point.
    """
    places: dict[tuple[str, str], list[Value]] = {}
    for row, column, value in entries:
        places.setdefault((row, column), []).append(value)
    rows = list(dict.fromkeys(row for row, _ in places))
    columns = list(dict.fromkeys(column for _, column in places))
    return Table(
        (corner, *columns),
        tuple(
            (row, *(spread(places.get((row, column), ()), digits) for column in columns))
            for row in rows
        ),
    )


def spread(values: Sequence[Value], digits: int = 1) -> str:
    """Numbers as mean and standard deviation (n - 1), words with how often they came."""
    numbers = [value for value in values if not isinstance(value, str)]
    words = Counter(value for value in values if isinstance(value, str))
    parts = []
    if numbers:
        parts.append(f"{statistics.fmean(numbers):.{digits}f}")
        if len(numbers) > 1:
            parts[0] += f" ± {statistics.stdev(numbers):.{digits}f}"
    parts += [f"{word} {count}" if len(values) > count else word for word, count in words.items()]
    return ", ".join(parts) or MISSING


def _escaped(cell: str) -> str:
    return cell.replace("|", r"\|")
