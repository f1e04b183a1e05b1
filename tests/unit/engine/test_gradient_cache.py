"""Chunks: with dropout the gradient of the chunked forward, without it that of the whole batch."""

from dataclasses import replace

import pytest
import torch

from mmscale.checkpoint.state import RunState
from mmscale.contracts import Features, LossInput, World
from mmscale.engine.gradient_cache import encode_rows
from mmscale.loss.objective import Objective
from mmscale.parallel.peers import Alone
from mmscale.training.part import Step
from mmscale.training.step import Learner, train_step
from tests.ranks.tiny import build_engine, joint_batch, read_gradients, tiny_config

DROPOUT = {
    "model__vision": {
        "name": "timm:vit_tiny_patch16_224",
        "weights": "random",
        "options": {
            "img_size": 16,
            "patch_size": 8,
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 2,
            "proj_drop_rate": 0.4,
            "pos_drop_rate": 0.2,
        },
    },
    "model__head": {"dropout": 0.3},
}
MICRO, SEED = 5, 11


def engine_of(settings, dtype=torch.float64):
    config = tiny_config(**settings)
    return build_engine(config, World(), "accelerate", dtype), Objective(config, Alone())


def gradients_of(settings, batch, micro, dtype=torch.float64):
    """Gradient before the update, and the loss, from a given random state."""
    engine, objective = engine_of(settings, dtype)
    kept = {}
    apply = engine.apply
    engine.apply = lambda *args: (kept.update(read_gradients(engine, "accelerate")), apply(*args))
    torch.manual_seed(SEED)
    done = train_step(Learner(engine, objective, Alone(), micro), batch, Step(RunState(0), 1e-2))
    engine.close()
    return kept, done.record.loss


def by_autograd(settings, batch, micro):
    """The chunks' forward with a graph over all of them, drawing the same masks in turn."""
    engine, objective = engine_of(settings)
    engine.module.get_submodule("scale").begin(0)
    torch.manual_seed(SEED)
    parts = [
        encode_rows(engine, batch, slice(start, start + micro), False)
        for start in range(0, len(batch), micro)
    ]
    features = Features(
        *(torch.cat([getattr(p, side) for p in parts]) for side in ("image", "text"))
    )
    image, text, scale, _ = engine.call("heads", features.image, features.text)
    out = objective(LossInput(image=image, text=text, ids=batch.match_ids, scale=scale))
    engine.begin_update()
    engine.backward(out.total, last=True)
    gradients = read_gradients(engine, "accelerate")
    engine.close()
    return gradients, out.total.item()


def assert_close(gradients, wanted, tolerance):
    whole = torch.stack([value.double().norm() for value in wanted.values()]).norm()
    assert gradients.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (gradients[name] - value).double().norm() / whole < tolerance, name


def test_with_dropout_both_passes_over_a_chunk_see_one_mask():
    batch = joint_batch(3, torch.float64)
    gradients, loss = gradients_of(DROPOUT, batch, MICRO)
    wanted, wanted_loss = by_autograd(DROPOUT, batch, MICRO)
    assert loss == pytest.approx(wanted_loss, rel=1e-12)
    assert_close(gradients, wanted, 1e-12)
    # Dropout is on: other chunks draw other masks.
    assert gradients_of(DROPOUT, batch, 4)[1] != pytest.approx(loss, rel=1e-3)


def test_with_an_adapters_dropout_both_passes_over_a_chunk_see_one_mask():
    adapter = {"kind": "lora", "rank": 2, "dropout": 0.4}
    settings = {"model__vision__adapter": adapter, "model__text__adapter": adapter}
    batch = joint_batch(3, torch.float64)
    gradients, _ = gradients_of(settings, batch, MICRO)
    assert_close(gradients, by_autograd(settings, batch, MICRO)[0], 1e-12)
    with pytest.raises(AssertionError, match="lora_B"):
        assert_close(gradients, gradients_of(settings, batch, 4)[0], 1e-3)


def test_a_batch_of_4096_in_chunks_of_32_is_the_batch():
    small = joint_batch(0)
    rows = 4096
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 98, (rows, 10), generator=generator)
    tokens[:, -1] = 98
    ids = torch.arange(rows) // 2
    batch = replace(
        small,
        image=torch.randn(rows, 3, 16, 16, generator=generator),
        tokens=tokens,
        mask=torch.ones_like(tokens, dtype=torch.bool),
        image_ids=ids,
        match_ids=ids,
        labels=ids,
        keys=[f"{row}#0" for row in range(rows)],
        captions=["a caption"] * rows,
        teacher_tokens={},
    )
    settings = {"train": {"global_batch_size": rows}}
    gradients, loss = gradients_of(settings, batch, 32, torch.float32)
    wanted, wanted_loss = gradients_of(settings, batch, rows, torch.float32)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert_close(gradients, wanted, 1e-5)
