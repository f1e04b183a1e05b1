"""First weights of a head's linear layers: drawn, or taken from feature rows."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mmscale.model.head_inputs import RANK_TOLERANCE, principal_axes

AUTOENCODER_STEPS = 200
AUTOENCODER_RATE = 3e-3
FITTED = ("pca", "autoencoder", "cca")


def draw(layers: nn.Module, kind: str, gain: float) -> None:
    """Random weights; biases are zero.

    `normal`: deviation gain x width^-0.5, so that unit variance stays so. `orthogonal`: rows or
    columns are orthonormal, times gain.
    """
    for module in layers.modules():
        if isinstance(module, nn.Linear):
            if kind == "orthogonal":
                nn.init.orthogonal_(module.weight, gain)
            else:
                nn.init.normal_(module.weight, std=gain * module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


@torch.no_grad()
def take_principal_axes(layers: nn.Sequential, rows: Float[Tensor, "n f"], gain: float) -> None:
    """Each linear layer projects onto the principal axes of the rows that enter it, times gain.

    A bias is set so that its outputs have mean 0. A layer wider than its input keeps the drawn
    weights in what it has beyond the axes.
    """
    for layer in layers:
        if isinstance(layer, nn.Linear):
            mean, _, vectors = principal_axes(rows)
            count = min(layer.out_features, layer.in_features)
            layer.weight[:count] = gain * vectors.T[:count].to(layer.weight)
            if layer.bias is not None:
                layer.bias.copy_(-(layer.weight.cpu().double() @ mean))
        rows = layer(rows)


@torch.no_grad()
def take_canonical_axes(
    heads: tuple[nn.Sequential, nn.Sequential],
    rows: tuple[Float[Tensor, "n f"], Float[Tensor, "n g"]],
    shrinkage: tuple[float, float],
) -> None:
    """Two linear heads project onto the canonical directions of paired rows, the closest first.

    Each direction is weighted with its correlation, so that inner products count directions by
    what they tell of the other side. With C = (1 - s) C + s tr(C)/f I on either side and
    C_x^-1/2 C_xy C_y^-1/2 = U S V', the weights are S U' C_x^-1/2 and S V' C_y^-1/2. A bias is set
    so that the outputs have mean 0.

    Source: Hotelling 1936; weighted by correlations as in Gong et al. 2014 (arXiv 1212.4522).

    Args:
        heads: Begin with a linear layer no wider than either input.
        rows: What enters them; row i of one and of the other are a pair.
        shrinkage: s of each side.
    """
    centred, inverse = [], []
    for side, share in zip(rows, shrinkage, strict=True):
        mean, values, vectors = principal_axes(side)
        values = (1 - share) * values + share * values.mean()
        scale = values.rsqrt().where(values > RANK_TOLERANCE * values[0], values.new_zeros(()))
        inverse.append(vectors * scale @ vectors.T)
        centred.append(side.detach().cpu().double() - mean)
    cross = centred[0].T @ centred[1] / len(centred[0])
    u, correlations, vt = torch.linalg.svd(inverse[0] @ cross @ inverse[1], full_matrices=False)
    # A pair of directions may be turned round: the largest entry is made positive on any machine.
    signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign().T
    for head, axes, matrix, side in zip(heads, (u.T, vt), inverse, rows, strict=True):
        layer = head[0]
        assert isinstance(layer, nn.Linear), "the configuration's rule"
        weight = (signs * correlations[:, None] * axes @ matrix)[: layer.out_features]
        layer.weight.copy_(weight)
        if layer.bias is not None:
            layer.bias.copy_(-(weight @ side.detach().cpu().double().mean(0)))


def train_autoencoder(layers: nn.Sequential, rows: Float[Tensor, "n f"]) -> None:
    """Fit the layers as the encoder of an autoencoder with a mirrored decoder, which is dropped.

    Adam on all rows at once, on the mean squared error; the same on every rank and in every run.
    """
    linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
    out = linears[-1].out_features
    rows = rows.to(linears[0].weight)
    was_training = layers.training
    layers.train()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        decoder: list[nn.Module] = []
        for width in [linear.in_features for linear in reversed(linears)]:
            decoder += [nn.Linear(out, width), nn.GELU()]
            out = width
        mirrored = nn.Sequential(*decoder[:-1]).to(rows)
        trained = [*layers.parameters(), *mirrored.parameters()]
        optimizer = torch.optim.Adam(trained, lr=AUTOENCODER_RATE)
        for _ in range(AUTOENCODER_STEPS):
            optimizer.zero_grad()
            F.mse_loss(mirrored(layers(rows)), rows).backward()
            optimizer.step()
    layers.zero_grad()
    layers.train(was_training)
