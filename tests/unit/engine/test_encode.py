"""A set through the towers: the same rows whatever the batch size and the number of ranks."""

import pytest
import torch

from mmscale.data.shards import open_shards
from mmscale.engine.encode import Encoder, encode
from mmscale.engine.inference import Inference
from mmscale.engine.plan import plan_batch
from mmscale.errors import DataError
from mmscale.model.build import build_model
from mmscale.parallel.peers import Alone


def call(mode, *inputs):
    """Towers that give back what can be checked by hand."""
    if mode == "image":
        return inputs[0].mean((2, 3))
    tokens, mask = inputs
    return torch.stack([(tokens * mask).sum(1), mask.sum(1)], 1).float()


@pytest.fixture(scope="module")
def shards_and_spec(synthetic):
    config = synthetic.config()
    _, spec = build_model(config.model, 32, 0)
    return open_shards("data.eval", str(synthetic.val)), spec


def table(shards_and_spec, batch_size, workers=0):
    shards, spec = shards_and_spec
    encoder = Encoder(call, torch.device("cpu"), spec, Alone(), batch_size, workers)
    return encode(encoder, shards)


@pytest.mark.parametrize("batch_size", [1, 5, 7, 64])
def test_batch_size_does_not_matter(shards_and_spec, batch_size):
    wanted, got = table(shards_and_spec, 24, workers=1), table(shards_and_spec, batch_size)
    assert got.keys == wanted.keys
    assert got.captions == wanted.captions
    torch.testing.assert_close(got.image, wanted.image)
    torch.testing.assert_close(got.text, wanted.text)


def test_captions_stay_with_their_image(shards_and_spec):
    shards, spec = shards_and_spec
    found = table(shards_and_spec, 7)
    assert len(found.captions) == 5 * shards.samples == len(found.text)
    for row, caption in enumerate(found.captions):
        tokens = spec.tokenize([caption])[0]
        assert found.text[row].tolist() == [sum(tokens), len(tokens)]
    assert found.text_ids().tolist() == [i for i in found.image_ids.tolist() for _ in range(5)]


def test_a_table_is_what_was_saved(shards_and_spec, tmp_path):
    wanted = table(shards_and_spec, 8)
    wanted.save(tmp_path / "cache" / "table.safetensors")
    got = type(wanted).load(tmp_path / "cache" / "table.safetensors")
    assert (got.keys, got.captions, got.damaged) == (wanted.keys, wanted.captions, wanted.damaged)
    assert torch.equal(got.image, wanted.image)
    (tmp_path / "cache" / "table.safetensors").write_bytes(b"not a table")
    with pytest.raises(DataError, match="not a feature cache"):
        type(wanted).load(tmp_path / "cache" / "table.safetensors")


def test_inference_is_without_a_graph_and_in_evaluation_mode(synthetic):
    config = synthetic.config()
    from mmscale.parallel.device import choose

    model, _ = build_model(config.model, 32, 0)
    inference = Inference(model, choose(config.engine))
    assert not model.training
    assert not inference.call("image", torch.zeros(1, 3, 32, 32)).requires_grad
    assert plan_batch(config, 1).chunks == 1
