import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder that holds `features/`, real embeddings that are not ours to ship."""
    folder = os.environ.get("MMSCALE_TEST_DATA")
    if not folder or not (Path(folder) / "features").is_dir():
        pytest.skip("MMSCALE_TEST_DATA does not name a folder that holds features/")
    return Path(folder)
