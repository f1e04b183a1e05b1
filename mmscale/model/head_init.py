"""First weights of a head's linear layers: drawn, or taken from feature rows."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mmscale.model.head_inputs import principal_axes

AUTOENCODER_STEPS = 200
AUTOENCODER_RATE = 3e-3
FITTED = ("pca", "autoencoder")


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
