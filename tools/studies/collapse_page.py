"""What the study `collapse` found, as Markdown."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence

from tools.studies.cells import Result
from tools.studies.collapse_faults import FAULTS, HEALTHY
from tools.studies.table import Table, spread, table_of

NOTHING = "none"
# A remedy helps where it gives back this share of what the failure took.
HELPS = 0.5


def page(results: Sequence[Result]) -> str:
    """A table of failures, then recall and verdict of each with each remedy."""
    good = [result for result in results if result.error is None]
    parts = [
        "Held-out recall: mean of R@1, R@5 and R@10 in both directions, percent; mean and standard "
        "deviation over seeds. A remedy is listed as a help where it gives back at least half of "
        f"what the failure took.\n\n{summary(good).markdown()}\n",
        f"Recall by remedy:\n\n{_by_remedy(good, 'recall').markdown()}\n",
        f"Verdict by remedy:\n\n{_by_remedy(good, 'verdict').markdown()}\n",
        "What a log of similarities shows without a remedy, mean over seeds:\n\n"
        f"{statistics_table(good).markdown()}\n",
    ]
    failed = len(results) - len(good)
    if failed:
        parts.append(f"{failed} of {len(results)} runs failed.\n")
    return "\n".join(parts)


def summary(results: Sequence[Result]) -> Table:
    """A line a failure: what it does, what the doctor says of it, what helps."""
    found = _recalls(results)
    whole = found.get((HEALTHY, NOTHING), [0.0])
    rows = []
    for fault, made in FAULTS.items():
        plain = found.get((fault, NOTHING))
        if plain is None:
            continue
        lost = statistics.fmean(whole) - statistics.fmean(plain)
        helped = sorted(
            (-statistics.fmean(values), remedy)
            for (name, remedy), values in found.items()
            if name == fault
            and remedy != NOTHING
            and fault != HEALTHY
            and statistics.fmean(values) > statistics.fmean(plain) + max(1.0, HELPS * lost)
        )
        verdicts = [
            r.figures["verdict"]
            for r in results
            if r.labels["failure"] == fault and r.labels["remedy"] == NOTHING
        ]
        helps = ", ".join(f"{remedy} ({-value:.0f})" for value, remedy in helped)
        rows.append((fault, spread(plain), _most(verdicts), helps or "-", made.mended or "-"))
    head = ("failure", "recall", "verdict", "remedies that help (recall)", "what undoes it")
    return Table(head, tuple(rows))


def statistics_table(results: Sequence[Result]) -> Table:
    """Mean of matched and unmatched cosines, and deviation against isotropy, by failure."""
    names = {
        "matched mean": "matched",
        "unmatched mean": "unmatched",
        "std x sqrt(d)": "std_off_sqrt_d",
        "held-out AUC": "auc",
        "training AUC": "train_auc",
        "variance image": "variance_image",
        "variance text": "variance_text",
    }
    return table_of(
        (
            (result.labels["failure"], title, _mean(results, result, name))
            for result in results
            if result.labels["remedy"] == NOTHING and result.labels["seed"] == _first(results)
            for title, name in names.items()
        ),
        "failure",
        digits=3,
    )


def _first(results: Sequence[Result]) -> int:
    return min(int(result.labels["seed"]) for result in results)


def _mean(results: Iterable[Result], like: Result, name: str) -> float:
    """Over the seeds of one cell."""
    return statistics.fmean(
        result.figures[name]
        for result in results
        if all(result.labels[k] == like.labels[k] for k in ("failure", "remedy"))
    )


def _by_remedy(results: Sequence[Result], name: str) -> Table:
    return table_of(
        (
            (result.labels["remedy"], result.labels["failure"], result.figures[name])
            for result in results
        ),
        "remedy",
        digits=0,
    )


def _recalls(results: Sequence[Result]) -> dict[tuple[str, str], list[float]]:
    found: dict[tuple[str, str], list[float]] = {}
    for result in results:
        place = result.labels["failure"], result.labels["remedy"]
        found.setdefault(place, []).append(result.figures["recall"])
    return found


def _most(verdicts: Sequence[str]) -> str:
    (name, count), *_ = Counter(verdicts).most_common()
    return name if count == len(verdicts) else f"{name} {count}/{len(verdicts)}"
