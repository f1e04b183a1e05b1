"""Match scores of chosen pairs of a set: those of one pair at a time, however they are cut."""

import pytest
import torch

from mmscale.data.features import SampleBatches
from mmscale.data.shards import open_shards
from mmscale.data.stream import pad
from mmscale.engine.encode import Encoder, encode
from mmscale.engine.feed import images_on
from mmscale.engine.inference import Inference
from mmscale.engine.rerank import match_scores
from mmscale.model.build import build_model
from mmscale.parallel.device import choose
from mmscale.parallel.peers import Alone

FUSION = "model.fusion={enabled: true, dim: 16, heads: 2, layers: 1}"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def setting(synthetic):
    config = synthetic.config(FUSION, "data.image_size=32")
    model, spec = build_model(config.model, 32, 0)
    shards = open_shards("data.eval", str(synthetic.val))
    call = Inference(model, choose(config.engine)).call
    return call, shards, spec, encode(Encoder(call, CPU, spec, Alone(), 32), shards)


def one_by_one(call, shards, spec, table, wanted):
    batches = SampleBatches(shards, spec, range(shards.samples), 1)
    scores = []
    for image, caption in wanted.tolist():
        tokens, mask = pad(spec.tokenize([table.captions[caption]]), spec.pad_token)
        _, image_tokens = call("image_sequence", images_on(batches[image].pixels, CPU, spec))
        _, text_tokens = call("text_sequence", tokens, mask)
        own = torch.tensor([0])
        logits, _ = call("fuse", image_tokens, text_tokens, mask, own, own, None)
        scores.append(logits[0, 1] - logits[0, 0])
    return torch.stack(scores)


@pytest.mark.parametrize("batch_size", [5, 64])
def test_scores_are_those_of_one_pair_at_a_time(setting, batch_size):
    call, shards, spec, table = setting
    torch.manual_seed(0)
    images = torch.randint(0, shards.samples, (40,))
    captions = torch.randint(0, len(table.captions), (40,))
    wanted = torch.stack([images, captions], 1).unique(dim=0)
    got = match_scores(Encoder(call, CPU, spec, Alone(), batch_size), shards, table, wanted)
    torch.testing.assert_close(
        got, one_by_one(call, shards, spec, table, wanted), atol=1e-5, rtol=1e-4
    )
    assert got.std() > 1e-4
