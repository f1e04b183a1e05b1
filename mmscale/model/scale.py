"""The inverse temperature, in one place: learnt, fixed or scheduled, and fitted to the data's size.

With it lives the logits' bias of losses that judge each pair alone (SigLIP).
"""

import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmscale.config.model import LogitScaleConfig, ModelConfig
from mmscale.config.values import StepsOf, whole_steps
from mmscale.errors import ConfigError

# Scales clipped at 100 in training are stored a rounding above it.
_SLACK = 1e-3
SMALL_SET = 1_000
SMALL_SET_TEMPERATURE = 0.8


class LogitScale(nn.Module):
    """Log of the scale as a tensor of shape (1,); a 0-D parameter crashes DeepSpeed.

    Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language
    Supervision", section 2.5 (learnt, clipped at 100); Zhai et al. 2023, "Sigmoid Loss for Language
    Image Pre-Training", section 3.2 (bias).
    """

    log_scale: Tensor
    log_bound: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, config: LogitScaleConfig, of_whole: bool = False):
        """Build it at its first value.

        Args:
            config: `model.logit_scale`.
            of_whole: Of a whole model, whose own first scale may be the bound: a tensor among its
                weights, so that a checkpoint keeps it.
        """
        super().__init__()
        _check(config)
        self.log_max = math.log(config.limit)
        follows = of_whole and config.max == "auto"
        self.register_buffer("log_bound", torch.full((1,), self.log_max) if follows else None)
        self._course = config.course
        self._steps_of: StepsOf = whole_steps
        first = config.init if config.course is None else config.course.first
        log_scale = torch.full((1,), math.log(first))
        if config.learn and config.course is None:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)
        bias = None if config.bias is None else nn.Parameter(torch.full((1,), config.bias))
        self.register_parameter("bias", bias)

    def follow(self, steps_of: StepsOf) -> None:
        """Take the length of the run, by which a course in epochs or samples is read."""
        self._steps_of = steps_of

    def begin(self, step: int) -> None:
        """Before update `step`: move to where the course says, if there is one."""
        if self._course is not None:
            self.log_scale.fill_(math.log(self._course.at(step, self._steps_of)))

    def forward(self, part: str = "scale") -> Float[Tensor, "1"] | None:
        """The scale in [1, max], fp32 at least; or the `bias`, None without one.

        Clamped where it is used, so that shards of the parameter cannot disagree; the gradient
        passes straight through, so that a scale beyond the limit can come back.
        """
        if part == "bias":
            return None if self.bias is None else _wide(self.bias) * 1
        log_scale = _wide(self.log_scale)
        if self.log_bound is None:
            clamped = log_scale.detach().clamp(0.0, self.log_max)
        else:
            clamped = log_scale.detach().clamp(min=0.0).minimum(_wide(self.log_bound))
        return (clamped + (log_scale - log_scale.detach())).exp()

    def limit(self) -> float:
        """The scale's bound."""
        return math.exp(self.log_max if self.log_bound is None else float(self.log_bound))

    @torch.no_grad()
    def begin_within(self, origin: str) -> None:
        """Take the bound from first weights that are there now, where the settings leave it open.

        Args:
            origin: Of the weights, for the message.

        Raises:
            ConfigError: The scale lies above `model.logit_scale.max`.
        """
        own = float(self.log_scale)
        if self.log_bound is not None:
            self.log_bound.fill_(max(own, self.log_max))
        elif own > self.log_max + _SLACK:
            raise ConfigError(
                f"{origin} has a logit scale of {math.exp(own):.1f}, above model.logit_scale.max="
                f"{math.exp(self.log_max):g}, which would cut it off; raise model.logit_scale.max."
            )


def take_scale(scale: LogitScale, log_scale: Tensor, bias: Tensor | None, origin: str) -> None:
    """A whole model's own scale, and its bias where the objective has one: a softmax sees none.

    Raises:
        ConfigError: The scale lies above `model.logit_scale.max`.
    """
    with torch.no_grad():
        scale.log_scale.copy_(log_scale.detach().reshape(1).clamp(0.0, math.inf))
        if scale.bias is not None and bias is not None:
            scale.bias.copy_(bias.reshape(1))
    scale.begin_within(origin)


def with_scale_fitted(model: ModelConfig, num_images: int) -> ModelConfig:
    """With `by_data_size`: the temperature times 0.8 where there are fewer than 1,000 images."""
    config = model.logit_scale
    if not config.by_data_size or num_images >= SMALL_SET:
        return model

    def raised(scale: float) -> float:
        return min(scale / SMALL_SET_TEMPERATURE, config.limit)

    course = config.course
    if course is not None:
        course = replace(course, first=raised(course.first), last=raised(course.last))
    fitted = config.model_copy(update={"init": raised(config.init), "course": course})
    return model.model_copy(update={"logit_scale": fitted})


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _check(config: LogitScaleConfig) -> None:
    if config.course is None:
        named = {"init": config.init}
    else:
        named = {"course.from": config.course.first, "course.to": config.course.last}
    for name, value in named.items():
        if config.limit < 1 or not 1 <= value <= config.limit:
            raise ConfigError(
                f"model.logit_scale.{name}={value:g} lies outside [1, "
                f"model.logit_scale.max={config.limit:g}]; move it inside."
            )
