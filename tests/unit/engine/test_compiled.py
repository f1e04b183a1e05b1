"""Compiled blocks compute what the library's do, with few shapes, and change no name."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from mmscale.data.stream import pad
from mmscale.engine.compiled import (
    MOST_LENGTHS,
    SHORTEST_RUN,
    caption_lengths,
    compile_blocks,
    evaluating,
    is_compiled,
)
from mmscale.errors import ConfigError
from mmscale.model.build import build_model
from mmscale.parallel.device import DevicePolicy
from tests.unit.model.tiny import CLIP_TEXT, model_config

VIT = {
    "name": "timm:vit_tiny_patch16_224",
    "weights": "random",
    "options": {
        "img_size": 16,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 3,
        "num_heads": 2,
        "proj_drop_rate": 0.4,
    },
}
LENGTHS = (4, 8, 12)


def towers():
    model, _ = build_model(model_config(vision=VIT, text=CLIP_TEXT), None, 0)
    return model.train()


def outputs(model, length, seed=3):
    """Both towers' features of six rows, drawn after `seed`."""
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(1, 400, (6, length), generator=generator)
    images = torch.randn(6, 3, 16, 16, generator=generator)
    torch.manual_seed(seed)
    return model("image", images), model("text", tokens, torch.ones_like(tokens, dtype=torch.bool))


@pytest.mark.slow
def test_compiled_blocks_equal_the_librarys_with_one_mask_in_both_passes_and_few_graphs():
    plain, compiled = towers(), towers()
    names = list(compiled.state_dict())
    counters.clear()
    assert compile_blocks([compiled.vision, compiled.text]) == 5
    assert list(compiled.state_dict()) == names
    for length in LENGTHS:
        with torch.no_grad():
            first = outputs(compiled, length)
        second = outputs(compiled, length)
        assert torch.equal(first[1], second[1].detach())
        # Dropout's masks are the compiler's own, and the same in both passes.
        torch.testing.assert_close(first[0], second[0].detach(), rtol=0, atol=1e-5)
        assert not torch.allclose(first[0], outputs(compiled, length, seed=4)[0], atol=1e-2)
        (second[0].sum() + second[1].sum()).backward()
    graphs = counters["stats"]["unique_graphs"]
    # With and without a graph: one shape of images, each length of captions; not one a block.
    assert graphs <= 2 * (1 + len(LENGTHS))
    with evaluating(plain), evaluating(compiled), torch.no_grad():
        for mine, theirs in zip(outputs(compiled, 7), outputs(plain, 7), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == graphs
    plain.zero_grad(), compiled.zero_grad()
    for model in (plain, compiled):
        features = outputs(model, 8)[1]
        (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
    for (name, mine), theirs in zip(
        compiled.text.named_parameters(), plain.text.parameters(), strict=True
    ):
        if theirs.grad is not None:
            close = 1e-5 * theirs.grad.norm() + 1e-7
            assert (mine.grad - theirs.grad).norm() <= close, name


def test_a_copy_that_is_taken_before_has_forwards_of_its_own():
    model = towers()
    follower = copy.deepcopy(model)
    compile_blocks([model.text])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert outputs(follower, 4)[1].abs().sum() > 0


def test_towers_without_blocks_are_refused():
    model, _ = build_model(model_config(), None, 0)
    with pytest.raises(ConfigError, match=r"engine\.compile=off"):
        compile_blocks([model.vision])


@pytest.mark.parametrize("context", [16, 20, 32, 64, 77, 248])
def test_captions_have_few_lengths_and_the_longest_is_the_towers(context):
    lengths = caption_lengths(context)
    assert len(lengths) <= MOST_LENGTHS
    assert list(lengths) == sorted(set(lengths))
    assert lengths[-1] == context
    assert all(length % 8 == 0 for length in lengths[:-1])


def test_a_batch_is_padded_to_the_first_length_that_is_enough():
    rows = [[5, 6, 7], [8]]
    tokens, mask = pad(rows, 9, (4, 8))
    assert tokens.tolist() == [[5, 6, 7, 9], [8, 9, 9, 9]]
    assert mask.sum().item() == 4
    assert pad([[1] * 4], 0, (4, 8))[0].shape == (1, 4)
    assert pad([[1] * 9], 0, (4, 8))[0].shape == (1, 9)
    assert torch.equal(pad(rows, 9)[0], tokens[:, :3])


def test_auto_compiles_long_runs_on_a_card():
    cpu = DevicePolicy(torch.device("cpu"), torch.float32, "", "gloo")
    card = DevicePolicy(torch.device("cuda"), torch.float32, "", "gloo", runs_ahead=True)
    assert not is_compiled("auto", cpu, SHORTEST_RUN)
    assert is_compiled("auto", card, SHORTEST_RUN)
    assert not is_compiled("auto", card, SHORTEST_RUN - 1)
    assert is_compiled("blocks", cpu, 1)
    assert not is_compiled("off", card, SHORTEST_RUN)
