"""What a run says about its own speed: phases, FLOPs, memory, and a trace when it is asked."""

import gzip
import json

import pytest

from mmscale.parallel.phases import PHASES
from tests.whole.small_run import (
    ALONE,
    deepspeed,
    succeed,
    torchrun,
    training_lines,
    words_for,
    write_settings,
)

TIMES = ("data", *PHASES, "other")


@pytest.mark.parametrize(
    "launcher",
    [lambda: ALONE, pytest.param(torchrun, marks=pytest.mark.soak),
     pytest.param(deepspeed, marks=pytest.mark.slow)],
    ids=["alone", "torchrun", "deepspeed"],
)  # fmt: skip
def test_phases_add_up_to_the_step(synthetic, tmp_path, launcher):
    run_dir = tmp_path / "run"
    more = ["train.duration=6 steps", "train.micro_batch_size=4", "log.profile=2 steps"]
    more += ["log.page=true"]
    words = [*launcher(), *words_for(synthetic, write_settings(tmp_path)), f"run.dir={run_dir}"]
    succeed([*words, *more])
    lines = training_lines(run_dir)
    assert len(lines) == 6
    for line in lines:
        seconds = [line[f"time/{name}"] for name in TIMES]
        assert all(part >= 0 for part in seconds)
        whole = 16 / line["samples_per_second"]
        assert sum(seconds) == pytest.approx(whole, rel=1e-6)
        assert line["time/forward"] > 0
        assert line["time/backward"] > 0
        assert (line["time/communication"] > 0) == (launcher in (torchrun, deepspeed))
        assert line["tokens_per_second"] > 16 / whole
        assert line["memory_bytes"] > 50e6
        assert "mfu" not in line, "a CPU's peak is not known"
    # The same products take longer in a longer update.
    assert lines[2]["flops_per_second"] > 1e6
    trace = json.loads(gzip.decompress((run_dir / "profile.json.gz").read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert set(PHASES) - {"communication"} <= names
    assert "Where the time goes" in (run_dir / "report.html").read_text("utf-8")
