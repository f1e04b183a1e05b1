import pytest
import torch
from torch import nn

from mmscale.config.model import HeadConfig
from mmscale.errors import ConfigError
from mmscale.model.batch_norm import GlobalBatchNorm
from mmscale.model.build import build_model
from mmscale.model.heads import Head
from tests.unit.model.tiny import model_config


def head(width=12, embed_dim=5, **settings):
    return Head(width, embed_dim, HeadConfig.model_validate(settings)).double()


def features(rows=400, width=12):
    """Correlated rows off the origin, their variances falling by a factor of 2 a direction."""
    mix, _ = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))
    spread = 0.5 ** torch.arange(width, dtype=torch.float64)
    return (torch.randn(rows, width, dtype=torch.float64) * spread.sqrt()) @ mix.T + 3


def covariance(rows):
    return torch.cov(rows.T, correction=0)


@pytest.mark.parametrize("kind", ["linear", "mlp", "projector"])
def test_heads_have_no_bias_unless_asked(kind):
    plain = Head(512, 256, HeadConfig(kind=kind, batch_norm=False))
    assert not any("bias" in name for name, _ in plain.named_parameters())
    assert plain(torch.randn(300, 512)).shape == (300, 256)
    if kind == "linear":
        assert plain(torch.randn(300, 512)).std().item() == pytest.approx(1, abs=0.05)
    assert any("bias" in name for name, _ in head(kind=kind, bias=True).named_parameters())


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({}, "Linear"),
        ({"batch_norm": True}, "Linear GlobalBatchNorm"),
        ({"kind": "mlp"}, "Linear GELU Linear"),
        ({"kind": "mlp", "batch_norm": True}, "Linear GlobalBatchNorm GELU Linear"),
        (
            {"kind": "projector", "activation": "relu"},
            "Linear GlobalBatchNorm ReLU Linear GlobalBatchNorm ReLU Linear",
        ),
        (
            {"kind": "projector", "layers": 4, "batch_norm": False},
            "Linear GELU Linear GELU Linear GELU Linear",
        ),
    ],
)
def test_a_head_is_made_of_these_layers(settings, layers):
    built = head(hidden=7, **settings)
    assert " ".join(type(layer).__name__ for layer in built.layers) == layers
    assert built(torch.randn(3, 12, dtype=torch.float64)).shape == (3, 5)


def test_identity_needs_equal_widths_and_keeps_rows():
    rows = features()
    assert torch.equal(head(12, 12, kind="identity")(rows), rows)
    assert not list(head(12, 12, kind="identity").parameters())
    with pytest.raises(ConfigError, match=r"model\.head\.kind=identity.* 12 .*embed_dim=5"):
        head(kind="identity")


def test_a_side_may_differ():
    settings = {"kind": "mlp", "text": {"kind": "projector", "hidden": 9}}
    model, _ = build_model(model_config(head=settings), 32, seed=0)
    assert len(model.head["image"].layers) == 3
    assert [p.shape[0] for n, p in model.head["text"].named_parameters() if p.ndim == 2] == [
        9,
        9,
        16,
    ]
    with pytest.raises(ConfigError, match=r"model\.head\.text\.kind=identity"):
        build_model(model_config(head={"text": {"kind": "identity"}}), 32, seed=0)


def test_batch_norm_is_torch_s_and_ignores_a_batch_that_is_not_finite():
    ours, theirs = GlobalBatchNorm(6).double(), nn.BatchNorm1d(6).double()
    for _ in range(3):
        rows = torch.randn(20, 6, dtype=torch.float64) * 3 + 1
        mine, other = rows.clone().requires_grad_(), rows.clone().requires_grad_()
        got, want = ours(mine), theirs(other)
        torch.testing.assert_close(got, want)
        pull = torch.randn_like(got)
        for output, leaf in ((got, mine), (want, other)):
            (output * pull).sum().backward()
            assert leaf.grad is not None
        torch.testing.assert_close(mine.grad, other.grad)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    ours(torch.full((4, 6), torch.nan, dtype=torch.float64))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    rows = torch.randn(1, 6, dtype=torch.float64)
    torch.testing.assert_close(ours.eval()(rows), theirs.eval()(rows))


def test_standardisation_is_the_identity_until_fitted():
    rows = torch.randn(50, 6) * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 0.0]) + 7
    built = Head(6, 6, HeadConfig(standardize=50))
    torch.testing.assert_close(built.standardize(rows), rows)
    built.fit(rows)
    seen = built.standardize(rows)
    torch.testing.assert_close(seen.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[:, :5].std(0, correction=0), torch.ones(5))
    assert seen[:, 5].abs().max() < 1e-5
    assert {"standardize.mean", "standardize.std"} <= set(built.state_dict())
    assert not any("standardize" in name for name, _ in built.named_parameters())


def test_standardisation_does_not_blow_up_a_dead_feature():
    rows = torch.randn(50, 6)
    # A pretrained layer norm may hold a weight of 1e-30: exact zero in all but name.
    rows[:, 2] *= 1e-30
    built = Head(6, 6, HeadConfig(standardize=50))
    built.fit(rows)
    leaf = rows.clone().requires_grad_()
    built(leaf).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.abs().max() < 100


@pytest.mark.parametrize("kind", ["zca", "pca"])
def test_whitening_gives_unit_covariance(kind):
    rows = features()
    built = head(whiten=kind, shrinkage=0.0)
    torch.testing.assert_close(built.whiten(rows), rows)
    built.fit(rows)
    white = built.whiten(rows)
    torch.testing.assert_close(covariance(white), torch.eye(12).double())
    torch.testing.assert_close(white.mean(0), torch.zeros(12).double(), atol=1e-9, rtol=0)
    if kind == "zca":
        torch.testing.assert_close(built.whiten.matrix, built.whiten.matrix.T)
    else:
        first = built.whiten.matrix[0] / built.whiten.matrix[0].norm()
        largest = torch.linalg.eigh(covariance(rows)).eigenvectors[:, -1]
        assert abs(first @ largest).item() == pytest.approx(1)


def test_shrinkage_keeps_noise_small_and_a_dead_direction_dead():
    rows = features()
    rows[:, 3] = 1.0
    strict, shrunk = head(whiten="zca", shrinkage=0.0), head(whiten="zca", shrinkage=0.5)
    for built in (strict, shrunk):
        built.fit(rows)
    values = torch.linalg.eigvalsh(covariance(rows))
    wanted = (0.5 * values + 0.5 * values.mean()).rsqrt().sort().values
    torch.testing.assert_close(torch.linalg.eigvalsh(shrunk.whiten.matrix), wanted)
    assert strict.whiten(rows)[:, 3].abs().max() < 1e-6


def test_unit_rms_forgets_a_row_s_length():
    built, rows = head(unit_rms=True), features()
    torch.testing.assert_close(built(rows), built(7 * rows))
    assert built(torch.zeros(2, 12).double()).abs().max() == 0


def test_parts_are_fitted_on_what_reaches_them():
    rows = features()
    built = head(unit_rms=True, standardize=8, whiten="pca", shrinkage=0.0, init="pca", bias=True)
    assert built.fit_rows == 4096
    built.fit(rows)
    out = built(rows)
    torch.testing.assert_close(covariance(out), torch.eye(5).double())
    torch.testing.assert_close(out.mean(0), torch.zeros(5).double(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("bias", [False, True])
def test_pca_keeps_the_directions_of_largest_variance(bias):
    rows = features()
    built = head(init="pca", gain=2.0, bias=bias)
    built.fit(rows)
    values = torch.linalg.eigvalsh(covariance(rows)).flip(0)
    torch.testing.assert_close(covariance(built(rows)), torch.diag(4 * values[:5]))
    assert (built(rows).mean(0).abs().max() < 1e-9) == bias


def test_pca_of_a_layer_wider_than_its_input_leaves_no_dimension_dead():
    built = head(12, 20, init="pca")
    built.fit(features())
    assert covariance(built(features())).diag().min() > 1e-4


def test_orthogonal_weights_keep_lengths():
    weight = head(init="orthogonal", gain=3.0).layers[0].weight
    torch.testing.assert_close(weight @ weight.T, 9 * torch.eye(5).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "projector"])
def test_an_autoencoder_keeps_more_of_the_features_than_a_random_start(kind):
    def lost(built):
        codes = built.train()(rows).detach()
        codes = torch.cat([codes, torch.ones(len(codes), 1).double()], 1)
        solution = torch.linalg.lstsq(codes, rows).solution
        return ((codes @ solution - rows) ** 2).mean().item()

    rows = features() - 3
    settings = {"kind": kind, "hidden": 24, "bias": True}
    noise = torch.get_rng_state()
    fitted, random = head(init="autoencoder", **settings), head(**settings)
    torch.set_rng_state(noise)
    state = torch.get_rng_state()
    fitted.fit(rows)
    assert torch.equal(state, torch.get_rng_state()), "fitting draws from the caller's generator"
    assert lost(fitted) < 0.5 * lost(random)
    best = torch.linalg.eigvalsh(covariance(rows))[:-5].sum().item() / 12
    if kind == "linear":
        assert lost(fitted) < 1.5 * best


def pairs(rows=600):
    """Image and text features that share three directions, and much that is their own."""
    shared = torch.randn(rows, 3, dtype=torch.float64)
    mixes = [torch.randn(3, width, dtype=torch.float64) for width in (12, 8)]
    return [shared @ mix + 2 * features(rows, mix.shape[1]) for mix in mixes]


@pytest.mark.parametrize("bias", [False, True])
def test_canonical_heads_give_each_direction_the_weight_of_its_correlation(bias):
    image, text = pairs()
    settings = {"init": "cca", "shrinkage": 0.0, "bias": bias}
    ours, theirs = head(12, 8, **settings), head(8, 8, **settings)
    ours.fit_with(theirs, image, text)
    # The squared correlations are the eigenvalues of Cx^-1 Cxy Cy^-1 Cyx.
    joint = covariance(torch.cat([image, text], 1))
    cx, cxy, cy = joint[:12, :12], joint[:12, 12:], joint[12:, 12:]
    product = torch.linalg.solve(cx, cxy) @ torch.linalg.solve(cy, cxy.T)
    squared = torch.linalg.eigvals(product).real.sort(descending=True).values[:8]
    u, v = ours(image), theirs(text)
    torch.testing.assert_close(covariance(u), torch.diag(squared))
    torch.testing.assert_close(covariance(v), torch.diag(squared))
    cross = covariance(torch.cat([u, v], 1))[:8, 8:]
    torch.testing.assert_close(cross, torch.diag(squared**1.5), atol=1e-9, rtol=1e-6)
    assert (u.mean(0).abs().max() < 1e-9) == bias


def test_canonical_heads_find_the_pairs_of_rows_they_have_not_seen():
    image, text = pairs(1200)
    settings = {"init": "cca", "standardize": 8, "shrinkage": 0.1}
    ours, theirs = head(12, 8, **settings), head(8, 8, **settings)
    assert ours.fit_rows == 4096
    ours.fit_with(theirs, image[:1000], text[:1000])
    units = [
        nn.functional.normalize(part(rows[1000:]), dim=1)
        for part, rows in ((ours, image), (theirs, text))
    ]
    ranks = (units[0] @ units[1].T).argsort(1, descending=True)
    found = (ranks[:, :10] == torch.arange(200)[:, None]).any(1).double().mean()
    assert found > 0.5, "by chance it is 0.05"


def test_canonical_heads_have_no_more_directions_than_features():
    with pytest.raises(ConfigError, match=r"init=cca .* set model.embed_dim=6 or less"):
        Head(6, 8, HeadConfig(init="cca"))


def test_dropout_leaves_features_out_in_training_only():
    built, plain = head(12, 12, kind="identity", dropout=0.25), features(4000)
    kept = built(plain)
    left_out = kept == 0
    assert left_out.double().mean() == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(kept[~left_out], plain[~left_out] / 0.75)
    assert torch.equal(built.eval()(plain), plain)


def test_sides_may_shrink_and_leave_out_by_their_own_shares():
    settings = {"shrinkage": 0.4, "dropout": 0.5, "text": {"shrinkage": 0.2, "dropout": 0.1}}
    config = HeadConfig.model_validate(settings)
    built = {side: Head(12, 5, config.of(side)) for side in ("image", "text")}
    assert (built["image"].shrinkage, built["image"].dropout.p) == (0.4, 0.5)
    assert (built["text"].shrinkage, built["text"].dropout.p) == (0.2, 0.1)


def test_head_names_the_true_width():
    with pytest.raises(ConfigError, match=r"width 5 .* made for 6"):
        Head(6, 4, HeadConfig())(torch.zeros(2, 5))
