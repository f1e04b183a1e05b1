import math

import pytest
import torch
import torch.nn.functional as F

from mmscale.config.model import FusionConfig
from mmscale.errors import ConfigError
from mmscale.model.build import build_model
from mmscale.model.fusion import CrossAttention, Fusion, fuse_pairs
from mmscale.model.two_tower import component_of
from tests.unit.model.tiny import model_config, padded

SMALL = {"dim": 16, "heads": 2, "layers": 2, "classes": 3}
CAPTIONS = ["a red circle", "two dogs run over the green field", "a cat"]


def fusion(**settings):
    torch.manual_seed(1)
    return Fusion(24, 16, FusionConfig(**(SMALL | settings))).double()


def sequences(rows=4):
    image = torch.randn(rows, 5, 24, dtype=torch.float64)
    text = torch.randn(rows, 7, 16, dtype=torch.float64)
    lengths = torch.randint(1, 8, (rows,))
    return image, text, torch.arange(7) < lengths[:, None]


def test_attention_is_torch_s():
    ours = CrossAttention(16, 4).double()
    theirs = torch.nn.MultiheadAttention(16, 4, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key_value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key_value.bias]))
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    rows, others = torch.randn(3, 5, 16).double(), torch.randn(3, 7, 16).double()
    mask = torch.arange(7) < torch.tensor([7, 2, 5])[:, None]
    wanted, _ = theirs(rows, others, others, key_padding_mask=~mask)
    torch.testing.assert_close(ours(rows, others, mask), wanted)


def test_padding_does_not_count_and_order_of_pairs_does_not_matter():
    model, (image, text, mask) = fusion(), sequences()
    matching, classes = model(image, text, mask)
    assert (matching.shape, classes.shape) == ((4, 2), (4, 3))
    noise = text.where(mask[..., None], torch.randn_like(text))
    torch.testing.assert_close(model(image, noise, mask)[0], matching)
    longer = F.pad(text, (0, 0, 0, 3)), F.pad(mask, (0, 3))
    torch.testing.assert_close(model(image, *longer)[0], matching)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = model(image[order], text[order], mask[order])
    torch.testing.assert_close(shuffled[1], classes[order])


def test_a_projection_stands_only_where_widths_differ():
    names = {name for name, _ in fusion().enter.named_parameters()}
    assert {n for n in names if n.endswith("1.weight")} == {"image.1.weight"}
    assert fusion(classes=None)(*sequences())[1] is None


def test_both_sides_see_the_other():
    model, (image, text, mask) = fusion(layers=1), sequences()
    image.requires_grad_(), text.requires_grad_()
    blocks = model.blocks[0](model.enter["image"](image), model.enter["text"](text), mask)
    for output, other in ((blocks[0], text), (blocks[1], image)):
        (gradient,) = torch.autograd.grad(output.pow(2).sum(), other, retain_graph=True)
        assert gradient.abs().max() > 0
    (gradient,) = torch.autograd.grad(model(image, text, mask)[0].sum(), text)
    assert torch.equal(gradient.abs().sum(-1) > 0, mask)


@pytest.mark.parametrize("at_once", [1, 2, 3, 100])
def test_pairs_at_once_do_not_matter(at_once):
    model, (image, text, mask) = fusion(), sequences()
    chosen, others = torch.tensor([0, 1, 2, 3, 0, 2, 1]), torch.tensor([0, 1, 2, 3, 3, 0, 2])

    def outcome(count):
        leaves = [image.clone().requires_grad_(), text.clone().requires_grad_()]
        model.zero_grad()
        matching, classes = fuse_pairs(model, *leaves, mask, chosen, others, count)
        (matching.pow(2).sum() + classes.pow(3).sum()).backward()
        weights = [parameter.grad.clone() for parameter in model.parameters()]
        return matching.detach(), classes.detach(), *(leaf.grad for leaf in leaves), *weights

    for got, want in zip(outcome(at_once), outcome(None), strict=True):
        torch.testing.assert_close(got, want)


def test_heads_must_divide_the_width():
    with pytest.raises(ConfigError, match=r"fusion\.heads=3 .*dim=16.*heads=(2|4)"):
        Fusion(8, 8, FusionConfig(dim=16, heads=3))


def test_the_model_has_it_where_it_is_enabled():
    model, spec = build_model(model_config(fusion={**SMALL, "enabled": True}), 32, seed=0)
    plain, _ = build_model(model_config(), 32, seed=0)
    own = dict(model.named_parameters())
    assert {component_of(name) for name in own} >= {"fusion"}
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, own[name]), "fusion changes the start of another part"
    rows = spec.tokenize(CAPTIONS)
    tokens, mask = padded(rows, max(map(len, rows)), spec.pad_token)
    pixels = torch.randn(3, 3, 32, 32)
    image, image_sequence = model("image_sequence", pixels)
    text, text_sequence = model("text_sequence", tokens, mask)
    torch.testing.assert_close(image, model("image", pixels))
    torch.testing.assert_close(text, model("text", tokens, mask))
    assert text_sequence.shape[:2] == tokens.shape
    pairs = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 2, 1])
    matching, classes = model("fuse", image_sequence, text_sequence, mask, *pairs, None)
    assert (matching.shape, classes.shape) == ((4, 2), (4, 3))
    with pytest.raises(AssertionError, match="without fusion"):
        plain("fuse", image_sequence, text_sequence, mask, *pairs, None)


def test_it_learns_to_match():
    """Captions that carry their image's code: far below ln 2 within some steps, both classes."""
    torch.manual_seed(0)
    model = Fusion(16, 16, FusionConfig(dim=16, heads=2, layers=1))
    codes = torch.eye(16)[torch.arange(32) % 16]
    image = codes[:, None] + 0.1 * torch.randn(32, 4, 16)
    text = codes[:, None] + 0.1 * torch.randn(32, 6, 16)
    mask = torch.ones(32, 6, dtype=torch.bool)
    rows = torch.arange(32)
    images, texts = torch.cat([rows, rows]), torch.cat([rows, (rows + 1) % 32])
    targets = torch.cat([torch.ones(32), torch.zeros(32)]).long()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        loss = F.cross_entropy(
            fuse_pairs(model, image, text, mask, images, texts, None)[0], targets
        )
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3 * math.log(2)
