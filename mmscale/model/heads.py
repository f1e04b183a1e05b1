"""The projection of a tower's features to the shared width."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mmscale.config.model import HeadConfig
from mmscale.errors import ConfigError
from mmscale.model.batch_norm import GlobalBatchNorm

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}


class Head(nn.Module):
    """Scales and whitens features where asked, leaves some out in training, then projects them.

    `linear` is W x, as CLIP's; `mlp` has one hidden layer; `projector` has at least two, with
    batch normalisation, as VICReg's and Barlow Twins'; `identity` leaves features as they are.

    Source: Bardes et al. 2022 (arXiv 2105.04906), section 4.2, for the projector.
    """

    def __init__(self, width: int, embed_dim: int, config: HeadConfig, key: str = "model.head"):
        """Build one side's head with drawn weights.

        Args:
            width: Of the tower's features.
            embed_dim: Shared width.
            config: Of this side (`HeadConfig.of`).
            key: The setting that names this head, for messages.

        Raises:
            ConfigError: `identity` where the widths differ.
        """
        super().__init__()
        if config.kind == "identity" and width != embed_dim:
            raise ConfigError(
                f"{key}.kind=identity, but the tower gives {width} features and model.embed_dim="
                f"{embed_dim}; set model.embed_dim={width} or {key}.kind=linear"
            )
        if config.init == "cca" and width < embed_dim:
            raise ConfigError(
                f"{key}.init=cca finds no more directions than a tower has features, {width}, and "
                f"model.embed_dim={embed_dim}; set model.embed_dim={width} or less"
            )
        self.width = width
        self.shrinkage = config.shrinkage
        self.init, self.gain = config.init, config.gain
        self.unit_rms = config.unit_rms
        self.standardize = Standardize(width) if config.standardize else None
        whitens = config.whiten != "none"
        self.whiten = Whiten(width, config.whiten, config.shrinkage) if whitens else None
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.Sequential(*_layers(width, embed_dim, config))
        self._starts_from_rows = config.init in FITTED and config.kind != "identity"
        draw_weights(
            self.layers, config.init if config.init not in FITTED else "normal", config.gain
        )
        self.fit_rows = max(
            config.standardize, config.fit_rows if whitens or self._starts_from_rows else 0
        )

    def fit(self, rows: Float[Tensor, "n f"]) -> None:
        """Fit what the settings ask to be fitted, in the order in which a row passes it.

        Args:
            rows: Features of at least `fit_rows` pairs, over all ranks.
        """
        rows = self._fit_inputs(rows)
        if self._starts_from_rows and self.init == "pca":
            take_principal_axes(self.layers, rows, self.gain)
        elif self._starts_from_rows:
            train_autoencoder(self.layers, rows)

    def fit_with(
        self, other: "Head", rows: Float[Tensor, "n f"], others: Float[Tensor, "n g"]
    ) -> None:
        """Fit this head and another on pairs, both of them `init=cca`.

        Args:
            other: The other side's.
            rows: This side's features of at least `fit_rows` pairs, over all ranks.
            others: The other side's of the same pairs.
        """
        take_canonical_axes(
            (self.layers, other.layers),
            (self._fit_inputs(rows), other._fit_inputs(others)),
            (self.shrinkage, other.shrinkage),
        )

    def _fit_inputs(self, rows: Float[Tensor, "n f"]) -> Float[Tensor, "n f"]:
        """Fit what comes before the layers; returns what reaches them."""
        if self.unit_rms:
            rows = to_unit_rms(rows)
        for part in (self.standardize, self.whiten):
            if part is not None:
                part.fit(rows)
                rows = part(rows)
        return rows

    def forward(self, rows: Float[Tensor, "b f"]) -> Float[Tensor, "b d"]:
        if rows.shape[-1] != self.width:
            raise ConfigError(
                f"features of width {rows.shape[-1]} reached a head made for {self.width}, the "
                f"tower's own width; rebuild the feature cache with this model."
            )
        if self.unit_rms:
            rows = to_unit_rms(rows)
        if self.standardize is not None:
            rows = self.standardize(rows)
        if self.whiten is not None:
            rows = self.whiten(rows)
        return self.layers(self.dropout(rows))


def _layers(width: int, embed_dim: int, config: HeadConfig) -> list[nn.Module]:
    if config.kind == "identity":
        return [GlobalBatchNorm(width)] if config.batch_norm else []
    normalise = config.kind == "projector" if config.batch_norm is None else config.batch_norm
    hidden = config.hidden or width
    count = {"linear": 0, "mlp": 1, "projector": config.layers - 1}[config.kind]
    layers: list[nn.Module] = []
    for _ in range(count):
        layers.append(nn.Linear(width, hidden, bias=config.bias))
        layers += [GlobalBatchNorm(hidden)] if normalise else []
        layers.append(ACTIVATIONS[config.activation]())
        width = hidden
    layers.append(nn.Linear(width, embed_dim, bias=config.bias))
    return layers + ([GlobalBatchNorm(embed_dim)] if normalise and not count else [])


AUTOENCODER_STEPS = 200
AUTOENCODER_RATE = 3e-3
FITTED = ("pca", "autoencoder", "cca")


def draw_weights(layers: nn.Module, kind: str, gain: float) -> None:
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


# Below this share of its mean, fp32 sums cannot tell a feature's deviation from rounding; below
# this share of the usual deviation it is a dead one, whose gradient a division would blow up.
CONSTANT = 1e-6
# Directions with less than this share of the largest variance are rounding, and are not blown up.
RANK_TOLERANCE = 1e-6


class Standardize(nn.Module):
    """Shifts and scales each feature to mean 0 and deviation 1; the identity until fitted."""

    mean: Tensor
    std: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def fit(self, rows: Float[Tensor, "n f"]) -> None:
        """Keep each feature's mean and deviation; a constant or dead feature keeps deviation 1."""
        wide = rows.detach().cpu().double()
        mean = wide.mean(0)
        std = (wide - mean).pow(2).mean(0).sqrt()
        constant = std <= CONSTANT * torch.maximum(mean.abs(), std.pow(2).mean().sqrt())
        self.mean.copy_(mean)
        self.std.copy_(torch.where(constant, torch.ones_like(std), std))

    def forward(self, rows: Float[Tensor, "b f"]) -> Float[Tensor, "b f"]:
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return ((wide - self.mean) / self.std).to(rows.dtype)


class Whiten(nn.Module):
    """Rotates and scales features to mean 0 and unit covariance; the identity until fitted.

    With the covariance C = U L U': `pca` is L^-1/2 U' (z), features by falling variance; `zca` is
    U L^-1/2 U', the whitening that changes the features least. C is shrunk first, (1 - s) C +
    s tr(C)/f I, so that few rows or dead directions are not blown up.

    Source: Kessy et al. 2018 (arXiv 1512.00809), table 1; shrinkage to the scaled identity as in
        Ledoit and Wolf 2004.
    """

    mean: Tensor
    matrix: Tensor

    def __init__(self, width: int, kind: str, shrinkage: float):
        super().__init__()
        self.kind = kind
        self.shrinkage = shrinkage
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("matrix", torch.eye(width))

    def fit(self, rows: Float[Tensor, "n f"]) -> None:
        """Keep the mean and the whitening matrix of these rows."""
        mean, values, vectors = principal_axes(rows)
        values = (1 - self.shrinkage) * values + self.shrinkage * values.mean()
        scale = values.rsqrt().where(values > RANK_TOLERANCE * values[0], values.new_zeros(()))
        matrix = scale[:, None] * vectors.T
        self.mean.copy_(mean)
        self.matrix.copy_(vectors @ matrix if self.kind == "zca" else matrix)

    def forward(self, rows: Float[Tensor, "b f"]) -> Float[Tensor, "b f"]:
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return ((wide - self.mean) @ self.matrix.T).to(rows.dtype)


def to_unit_rms(rows: Float[Tensor, "b f"]) -> Float[Tensor, "b f"]:
    """Each row divided by the root of its mean square; a row of zeros stays."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    square = wide.pow(2).mean(-1, keepdim=True)
    tiny = torch.finfo(wide.dtype).tiny
    return (wide * square.clamp(min=tiny).rsqrt()).to(rows.dtype)


def principal_axes(rows: Float[Tensor, "n f"]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [f], variances [f] falling, and unit directions in columns [f f]; float64 on the CPU."""
    wide = rows.detach().cpu().double()
    mean = wide.mean(0)
    centred = wide - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(wide))
    # An eigenvector's sign is arbitrary: the largest entry is made positive on any machine.
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    return mean, values.flip(0).clamp(min=0), (vectors * signs).flip(1)
