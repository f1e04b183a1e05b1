"""The documented way to add a term, followed to the letter: two source files, and it trains."""

import re
import shutil

from tests.whole.command import ROOT
from tests.whole.small_run import succeed, training_lines, words_for, write_settings


def test_a_term_is_added_in_two_files(synthetic, tmp_path):
    package = shutil.copytree(
        ROOT / "mmscale", tmp_path / "mmscale", ignore=shutil.ignore_patterns("__pycache__")
    )
    page = (ROOT / "docs" / "losses.md").read_text("utf-8").split("## A term of your own")[1]
    settings, function = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)[:2]
    path = package / "config" / "loss.py"
    source, union = path.read_text("utf-8"), "AnyTerm: TypeAlias = (\n"
    assert source.count(union) == 1
    path.write_text(source.replace(union, f"{settings}\n\n{union}    CyclicTerm\n    | "), "utf-8")
    (package / "loss" / "cyclic.py").write_text(function, "utf-8")
    folder = tmp_path / "run"
    words = [
        *words_for(synthetic, write_settings(tmp_path)),
        "loss.terms=[{kind: infonce}, {kind: cyclic, weight: 0.5}]",
        "train.duration=4 steps",
        "log.every=2 steps",
        f"run.dir={folder}",
    ]
    # Of the copied package, in an interpreter that knows no other.
    python = ("python", package / "train.py")
    succeed([*python, *words], env={"PYTHONPATH": str(tmp_path)})
    lines = training_lines(folder)
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert line["loss/cyclic"] > 0
        assert line["loss/cyclic_floor"] == 0
        assert "loss/cyclic_chance" not in line
        total = line["loss/infonce"] + 0.5 * line["loss/cyclic"]
        assert abs(line["loss"] - total) < 1e-6
