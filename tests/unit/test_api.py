"""`mmscale.diagnose` on rows of anybody's, and what the package gives by its name."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import mmscale
from mmscale.diagnostics.of_run import diagnose_alone
from mmscale.diagnostics.pairs import load_npz
from mmscale.errors import DataError
from tests.unit.diagnostics.faulty_embeddings import healthy


def test_what_is_diagnosed_is_what_the_file_of_it_would_be(tmp_path):
    pairs = healthy(0.5)(300, 64, 0)
    image, text = pairs.image, pairs.text.roll(3, 0)
    np.savez(tmp_path / "rows.npz", image=image.numpy(), text=text.numpy())
    told = diagnose_alone(load_npz(tmp_path / "rows.npz"))
    assert told.verdict != "healthy"
    assert mmscale.diagnose(image, text) == told
    assert mmscale.diagnose(image.numpy(), text.numpy().tolist()) == told
    names = [f"{row}.jpg" for row in range(300)]
    shifted = [*names[-3:], *names[:-3]]
    assert mmscale.diagnose(image, text, image_ids=names, text_ids=shifted).healthy


def test_rows_in_half_precision_with_gradients_are_taken():
    pairs = healthy(0.5)(300, 64, 0)
    image = pairs.image.bfloat16().requires_grad_()
    found = mmscale.diagnose(image, pairs.text, logit_scale=torch.tensor([10.0]))
    assert found.healthy


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="diagnose: image rows are 4 wide and text rows 5"):
        mmscale.diagnose(torch.ones(8, 4), torch.ones(8, 5))


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        mmscale.trian  # noqa: B018


def test_the_launched_file_is_a_function_however_it_was_imported():
    ask = (
        "{}import mmscale\n"
        "from mmscale.errors import ConfigError\n"
        "try: mmscale.train('demo', 'optim.lr=-1')\n"
        "except ConfigError as error: print(error)\n"
        "print(mmscale.train.main.__name__)"
    )
    for before in ("", "import mmscale.train\n", "from mmscale.train import main\n"):
        done = subprocess.run(
            [sys.executable, "-c", ask.format(before)], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[0].startswith("optim.lr=-1")
        assert done.stdout.splitlines()[1] == "main"
