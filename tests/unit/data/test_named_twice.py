"""A shard that is named twice, more captions than there are, and evaluation on what is trained."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from mmscale.data.schedule import plan_schedule
from mmscale.data.shards import open_shards, open_train
from mmscale.errors import ConfigError
from mmscale.evaluation.encoded import encoded_sets


@pytest.fixture
def spelt(synthetic, tmp_path, monkeypatch):
    """Other ways to name the training folder, and one tar of it."""
    (tmp_path / "link").symlink_to(synthetic.train)
    monkeypatch.chdir(synthetic.packed)
    return {
        "itself": str(synthetic.train),
        "relative": synthetic.train.name,
        "link": str(tmp_path / "link"),
        "dots": f"{synthetic.val}/../{synthetic.train.name}",
        "slash": f"{synthetic.train}/",
        "pattern": f"{synthetic.train}/*.tar",
        "tar": str(min(synthetic.train.glob("*.tar"))),
    }


@pytest.mark.parametrize("how", ["itself", "relative", "link", "dots", "slash", "pattern", "tar"])
def test_a_shard_that_is_named_twice_is_refused_however_it_is_spelt(synthetic, spelt, how):
    with pytest.raises(ConfigError, match="is named twice, first as") as caught:
        open_shards("data.train", [str(synthetic.train), spelt[how]])
    assert caught.value.exit_code == 2


def test_it_is_refused_as_a_source_and_without_a_manifest_too(synthetic, spelt):
    sources = [{"shards": spelt["link"], "weight": 2}, {"shards": str(synthetic.train)}]
    for words in ([], ["data.resampled=true"]):
        config = synthetic.config(*words)
        data = type(config.data).model_validate(config.data.model_dump() | {"train": sources})
        with pytest.raises(ConfigError, match="is named twice"):
            open_train(data)


def test_two_folders_are_two(synthetic):
    assert open_shards("data.train", [str(synthetic.train), str(synthetic.val)]).samples == 120


@pytest.mark.parametrize("captions", [5, 6])
def test_more_captions_than_any_image_has_are_refused(synthetic, captions):
    config = synthetic.config(f"data.captions={captions}", "train.global_batch_size=30")
    shards = open_train(config.data)
    if captions == 5:
        assert plan_schedule(config, shards, 1).steps
        return
    with pytest.raises(ConfigError, match=r"data\.captions=6: no image .* more than 5 captions"):
        plan_schedule(config, shards, 1)


@pytest.mark.parametrize("link", [False, True])
def test_evaluation_on_what_is_trained_is_told(synthetic, tmp_path, link):
    where = synthetic.train
    if link:
        where = tmp_path / "held_out"
        where.symlink_to(synthetic.train)
    assert "96 of its 96 images are in data.train too" in " ".join(told(synthetic, where))


def test_evaluation_on_other_shards_is_not(synthetic):
    assert not [line for line in told(synthetic, synthetic.val) if "data.eval" in line]


def told(synthetic, where: Path) -> list[str]:
    config, lines = synthetic.config(f"data.eval={where}"), []
    shards = open_train(config.data)
    encoded_sets(config, None, SimpleNamespace(spec=None), shards, lines.append)
    return lines
