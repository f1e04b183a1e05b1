"""`mmscale examine` on shards: what it tells, writes, and ends with."""

import json

import pytest

from mmscale.data.index import index
from tests.whole.command import explain, run
from tests.whole.test_foreign_shards import write


@pytest.mark.slow
def test_blank_images_and_those_of_the_evaluation_set_are_told(tmp_path):
    write(tmp_path / "data" / "0.tar", [(f"{n:05d}", n, f"a picture {n}") for n in range(8)])
    write(tmp_path / "held" / "0.tar", [(f"x{n:04d}", n, f"a picture {n}") for n in range(6, 10)])
    for name in ("data", "held"):
        index([tmp_path / name / "0.tar"])
    words = ["--against", tmp_path / "held", "--workers", "1", "--json", tmp_path / "found.json"]
    done = run(["mmscale", "examine", tmp_path / "data", *words])
    assert done.returncode == 3, explain(done)
    found = json.loads((tmp_path / "found.json").read_text("utf-8"))
    # Each is of one colour; numbers 6 and 7 have the bytes of the other set's.
    assert [(one["verdict"], one["share"]) for one in found["verdicts"]] == [
        ("leakage", 0.5),
        ("broken_images", 1.0),
    ]
    assert found["verdicts"][0]["examples"][0]["partner"] == "x0006"
    assert found["ceiling"]["t2i_r1"] == 100
    assert "2 of 4 evaluation images show a picture of the data" in done.stdout
