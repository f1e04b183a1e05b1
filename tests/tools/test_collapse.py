"""The study of collapse: failures do what they are named for, and the page says what mends them."""

import pytest

from tools.studies.cells import Result
from tools.studies.collapse import cells, measure, page
from tools.studies.collapse_faults import FAULTS
from tools.studies.collapse_remedies import REMEDIES

CELLS = {(c.labels["failure"], c.labels["remedy"]): c for c in cells((), [0])}


@pytest.mark.parametrize(
    ("fault", "remedy", "verdict"),
    [
        ("none", "none", "healthy"),
        ("pairs mixed in the file", "none", "shuffled_pairs"),
        ("pairs mixed in evaluation", "VICReg", "shuffled_pairs"),
        ("heads not trained", "none", "unaligned"),
        ("hardest negatives at once", "none", "complete_collapse"),
        ("overfitting", "none", "overfit"),
    ],
)
def test_a_failure_gets_its_name(fault, remedy, verdict, tmp_path):
    figures = measure(CELLS[fault, remedy], tmp_path)
    assert figures["verdict"] == verdict
    assert (figures["recall"] > 60) == (verdict == "healthy")


def test_every_failure_meets_every_remedy():
    assert len(CELLS) == len(FAULTS) * len(REMEDIES)
    assert "loss.terms" in CELLS["none", "VICReg"].words[-1]
    assert CELLS["hardest negatives at once", "a tenth of the rate"].words[-1] == "optim.lr=0.003"


def result(fault, remedy, seed, recall, verdict):
    names = ("matched", "unmatched", "std_off_sqrt_d", "auc", "train_auc")
    figures = dict.fromkeys((*names, "variance_image", "variance_text"), 0.5)
    labels = {"failure": fault, "remedy": remedy, "seed": seed}
    return Result(labels, (), 1.0, {**figures, "recall": recall, "verdict": verdict})


def test_the_page_says_what_helps():
    text = page(
        [
            result("none", "none", 0, 80.0, "healthy"),
            result("none", "none", 1, 82.0, "healthy"),
            result("rate too high", "none", 0, 2.0, "complete_collapse"),
            result("rate too high", "VICReg", 0, 3.0, "complete_collapse"),
            result("rate too high", "a tenth of the rate", 0, 75.0, "healthy"),
        ]
    )
    line = next(line for line in text.splitlines() if line.startswith("| rate too high"))
    assert "a tenth of the rate (75)" in line
    assert "VICReg" not in line
    assert "81.0 ± 1.4" in text
