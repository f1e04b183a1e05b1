"""The learnt inverse temperature."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmscale.config.schema import LogitScaleConfig
from mmscale.errors import ConfigError


class LogitScale(nn.Module):
    """Log of the scale as a parameter of shape (1,); a 0-D parameter crashes DeepSpeed.

    Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language
    Supervision", section 2.5 (learnt, clipped at 100).
    """

    def __init__(self, config: LogitScaleConfig):
        super().__init__()
        if config.max < 1 or not 1 <= config.init <= config.max:
            raise ConfigError(
                f"model.logit_scale.init={config.init:g} lies outside [1, "
                f"model.logit_scale.max={config.max:g}]; move it inside."
            )
        self.log_max = math.log(config.max)
        self.log_scale = nn.Parameter(torch.full((1,), math.log(config.init)))

    def forward(self) -> Float[Tensor, "1"]:
        """The scale in [1, max], fp32 at least.

        Clamped where it is used, so that shards of the parameter cannot disagree; the gradient
        passes straight through, so that a scale beyond the limit can come back.
        """
        log_scale = self.log_scale.to(torch.promote_types(self.log_scale.dtype, torch.float32))
        clamped = log_scale.detach().clamp(0.0, self.log_max)
        return (clamped + (log_scale - log_scale.detach())).exp()
