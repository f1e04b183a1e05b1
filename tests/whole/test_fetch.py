"""`mmscale fetch`: after it, a run starts without the hub."""

import pytest

from tests.hub import running_hub
from tests.unit.model.whole_hf import save_whole
from tests.whole.command import run
from tests.whole.small_run import succeed

PAGE = "who/tiny-clip"
RUN = [
    "demo",
    f"model.preset=hf:{PAGE}",
    "data.image_size=null",
    "train.global_batch_size=16",
    "train.duration=1 steps",
    "data.eval=null",
    "engine.device=cpu",
]


@pytest.mark.slow
def test_a_run_starts_without_the_hub_that_was_asked_before(synthetic, tmp_path):
    words = [*RUN, f"data.train={synthetic.train}", f"run.dir={tmp_path / 'run'}"]
    with running_hub() as hub:
        hub.pages[PAGE] = None
        page = tmp_path / "page"
        save_whole(page, "clip")
        hub.files[PAGE, "main"] = {file.name: file.read_bytes() for file in page.iterdir()}
        there = {**hub.environment(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
        offline = {**there, "HF_HUB_OFFLINE": "1"}
        before = run(["mmscale", "train", *words], env=offline)
        assert before.returncode == 2
        assert "the local cache lacks it" in before.stderr
        fetched = succeed(["mmscale", "fetch", *words], env=there)
        lines = fetched.stdout.splitlines()
        assert lines[0].startswith(f"{PAGE}: ")
        assert lines[1] == f"all that is needed of the hub lies in {tmp_path / 'cache' / 'hub'}"
        asked = len(hub.asked)
        succeed(["mmscale", "train", *words], env=offline)
        assert len(hub.asked) == asked
        again = succeed(["mmscale", "fetch", f"hf:{PAGE}"], env=there)
        assert again.stdout.splitlines() == lines[1:]
