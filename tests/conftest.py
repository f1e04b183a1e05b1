"""Fixtures of the whole suite. One thread a process, so that figures repeat bit for bit."""

import os

# Read when torch is loaded, here and in every process that a test starts.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# No test may depend on a hub: what is not on this machine must fail the same everywhere.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import random
import signal
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

from mmscale.config.load import load_config
from mmscale.config.schema import Config

torch.set_num_threads(1)
# A shell that starts this in the background has it ignored, and so would every process of a test.
signal.signal(signal.SIGINT, signal.default_int_handler)
# A busy machine is no fault of the code.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@dataclass(frozen=True)
class SyntheticPairs:
    """Rendered pairs: `source` in Flickr30k layout, `packed` with a folder of shards a split."""

    source: Path
    packed: Path

    @property
    def train(self) -> Path:
        return self.packed / "train"

    @property
    def val(self) -> Path:
        return self.packed / "val"

    @property
    def test(self) -> Path:
        return self.packed / "test"

    def config(self, *words: str) -> Config:
        """The demo preset over these pairs, changed by `words`."""
        return load_config(["demo", f"data.train={self.train}", f"data.eval={self.val}", *words])


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> SyntheticPairs:
    """144 small pairs in several shards a split: 96 train, 24 val, 24 test. Read only."""
    from mmscale.data.pack import PackSettings, pack
    from mmscale.data.synth import SynthSettings, render

    folder = tmp_path_factory.mktemp("synthetic")
    pairs = SyntheticPairs(folder / "source", folder / "packed")
    render(pairs.source, SynthSettings(144, seed=0, size=64, val=24, test=24))
    pack(pairs.source, pairs.packed, PackSettings(samples_per_shard=32))
    return pairs


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder with real photographs and captions, named by MMSCALE_TEST_DATA."""
    folder = os.environ.get("MMSCALE_TEST_DATA")
    if not folder:
        pytest.skip("MMSCALE_TEST_DATA names no folder with real pairs")
    if not Path(folder).is_dir():
        pytest.skip(f"MMSCALE_TEST_DATA={folder} is not a folder")
    return Path(folder).resolve()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
