"""The projection of a tower's features to the shared width."""

from jaxtyping import Float
from torch import Tensor, nn

from mmscale.config.heads import HeadConfig
from mmscale.errors import ConfigError
from mmscale.model.batch_norm import GlobalBatchNorm
from mmscale.model.head_init import (
    FITTED,
    draw,
    take_canonical_axes,
    take_principal_axes,
    train_autoencoder,
)
from mmscale.model.head_inputs import Standardize, Whiten, to_unit_rms

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
        draw(self.layers, config.init if config.init not in FITTED else "normal", config.gain)
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
