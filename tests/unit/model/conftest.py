from pathlib import Path

import pytest

from tests.unit.model.tiny import save_bert


@pytest.fixture
def bert_folder(tmp_path: Path) -> Path:
    """A saved BERT of width 24 with random weights, and its tokenizer."""
    return save_bert(tmp_path / "bert")
