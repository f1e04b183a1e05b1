"""The projection of a tower's features to the shared width."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmscale.config.schema import HeadConfig
from mmscale.errors import ConfigError

# Below this share of its mean, fp32 sums cannot tell a feature's deviation from rounding.
CONSTANT = 1e-6


class Standardize(nn.Module):
    """Shifts and scales each feature by statistics fitted beforehand; the identity until then."""

    mean: Tensor
    std: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def set_statistics(self, mean: Float[Tensor, " f"], std: Float[Tensor, " f"]) -> None:
        """Keep each feature's mean and deviation; a constant feature keeps deviation 1."""
        constant = std <= CONSTANT * mean.abs()
        self.mean.copy_(mean)
        self.std.copy_(torch.where(constant, torch.ones_like(std), std))

    def forward(self, rows: Float[Tensor, "b f"]) -> Float[Tensor, "b f"]:
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return ((wide - self.mean) / self.std).to(rows.dtype)


class Head(nn.Module):
    """`linear` (W x, as CLIP's) or `mlp` (one GELU layer as wide as its input)."""

    def __init__(self, width: int, embed_dim: int, config: HeadConfig):
        super().__init__()
        self.width = width
        self.standardize = Standardize(width) if config.standardize else None
        layers: list[nn.Module] = []
        if config.kind == "mlp":
            layers += [nn.Linear(width, width, bias=config.bias), nn.GELU()]
        layers.append(nn.Linear(width, embed_dim, bias=config.bias))
        self.layers = nn.Sequential(*layers)
        self.layers.apply(_initialise)

    def set_statistics(self, mean: Float[Tensor, " f"], std: Float[Tensor, " f"]) -> None:
        """Fit the input standardisation (`model.head.standardize` > 0)."""
        assert self.standardize is not None, "model.head.standardize is 0: nothing to fit"
        self.standardize.set_statistics(mean, std)

    def forward(self, rows: Float[Tensor, "b f"]) -> Float[Tensor, "b d"]:
        if rows.shape[-1] != self.width:
            raise ConfigError(
                f"features of width {rows.shape[-1]} reached a head made for {self.width}, the "
                f"tower's own width; rebuild the feature cache with this model."
            )
        if self.standardize is not None:
            rows = self.standardize(rows)
        return self.layers(rows)


def _initialise(module: nn.Module) -> None:
    """Normal with deviation width^-0.5, as CLIP's projections: unit variance stays so."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
