"""Rows beside a batch: parted, they are those that were joined, each under its name."""

from dataclasses import replace

import torch

from mmscale.contracts import Embeddings, Features, LossInput
from mmscale.training.beside import joined, parted
from tests.ranks.tiny import ROWS, joint_batch

ONE = torch.ones(1)


def _longer(seed):
    batch = joint_batch(seed)
    tokens = torch.cat([batch.tokens[:, :3], batch.tokens], dim=1)
    return replace(batch, tokens=tokens, mask=torch.ones_like(tokens, dtype=torch.bool))


def test_what_was_joined_is_parted_again():
    batch, beside = joint_batch(0), {"one": _longer(1), "two": joint_batch(2)}
    whole = joined(batch, beside)
    assert len(whole) == 3 * ROWS
    assert whole.mask.sum(1).tolist() == [10] * ROWS + [13] * ROWS + [10] * ROWS
    assert torch.equal(whole.tokens[:ROWS, :10], batch.tokens)
    assert not whole.mask[:ROWS, 10:].any()
    seen, sequence = whole.image.flatten(1), whole.tokens[..., None].float()
    rows = LossInput(
        Embeddings(seen, seen, seen), Embeddings(seen, seen, seen), whole.match_ids, ONE
    )
    own, features = parted(rows, Features(seen, seen, text_sequence=sequence), batch, beside)
    for found, wanted in ((own, batch), (own.beside["one"], beside["one"])):
        assert torch.equal(found.image.unit, wanted.image.flatten(1))
        assert torch.equal(found.text.raw, wanted.image.flatten(1))
    assert torch.equal(own.beside["two"].image.unit, beside["two"].image.flatten(1))
    assert torch.equal(features.image, batch.image.flatten(1))
    assert torch.equal(features.text_sequence[..., 0].long(), batch.tokens)


def test_a_batch_without_company_is_itself():
    batch = joint_batch(0)
    assert joined(batch, {}) is batch
