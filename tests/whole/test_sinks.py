"""A run whose sinks fail, hang or work is the same run."""

import importlib.util

import pytest

from tests.whole.command import explain
from tests.whole.outage import silent_server
from tests.whole.small_run import ALONE, course, metrics, succeed, words_for, write_settings

pytestmark = pytest.mark.slow
# Those that need nothing else, and a tracking server.
MISSING = [name for name in ("tensorboard", "mlflow") if importlib.util.find_spec(name) is None]


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_a_sink_that_fails_and_one_that_hangs_change_no_loss(synthetic, tmp_path):
    words = [*ALONE, *words_for(synthetic, write_settings(tmp_path)), "train.duration=6 steps"]
    sound, working, folder = tmp_path / "sound", tmp_path / "working", tmp_path / "run"
    succeed([*words, f"run.dir={sound}"])
    both = [*words, "log.tensorboard=true", "log.mlflow=offline", f"run.dir={working}"]
    done = succeed(both, cwd=tmp_path)
    assert course(working) == course(sound)
    assert "failed" not in done.stderr, explain(done)
    assert list((working / "tensorboard").glob("events.out.tfevents.*"))
    assert (working / "mlflow.db").is_file()

    folder.mkdir()
    (folder / "tensorboard").write_text("a file where a folder is needed")
    hanging = [*words, "log.tensorboard=true", "log.mlflow=online", f"run.dir={folder}"]
    with silent_server() as address:
        done = succeed(hanging, env={"MLFLOW_TRACKING_URI": address})
    assert course(folder) == course(sound)
    assert done.stderr.count("tensorboard failed") == 1, explain(done)
    assert "mlflow took longer than 20 s to end and was left alone" in done.stderr
    assert "Traceback" not in done.stderr, explain(done)
    assert metrics(folder)[-1]["finished"]
