"""What DeepSpeed is told: the choices of a file, and what the run decides."""

from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from mmscale.config.deepspeed import fill, read_deepspeed
from mmscale.config.schema import Config
from mmscale.engine.plan import BatchPlan
from mmscale.errors import ConfigError

# Layers whose products run in autocast's dtype, so that their weights and gradients may be sent in
# it. DeepSpeed compares classes, not what is made from them. Not Embedding: a gradient of two ranks
# that sends it low is three times as far from that of fp32 in ZeRO-3.
LOWER_PRECISION_SAFE: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.MultiheadAttention,
    NonDynamicallyQuantizableLinear,
)


def ds_file(name: str | None, chunks: int) -> dict[str, Any]:
    """A DeepSpeed file's settings for updates of so many chunks.

    Raises:
        ConfigError: ZeRO-1 would lose gradients.
    """
    settings = read_deepspeed(name)
    zero = settings["zero_optimization"]
    if zero["stage"] != 1:
        return settings
    # It reduces in the last backward, and only what has a gradient there (deepspeed 0.19.8): with
    # chunks the heads' gradient comes before.
    overlaps = zero.get("overlap_comm", "auto")
    if overlaps is True and chunks > 1:
        raise ConfigError(
            f"engine.deepspeed={name}: ZeRO-1 with overlap_comm=true loses the heads' gradient "
            f"where a batch is cut into {chunks} chunks; leave overlap_comm out of the file"
        )
    zero = {**zero, "overlap_comm": chunks == 1 if overlaps == "auto" else overlaps}
    return {**settings, "zero_optimization": zero}


def deepspeed_settings(config: Config, plan: BatchPlan, dtype: torch.dtype) -> dict[str, Any]:
    """The file's ZeRO choices with the run's batch, clipping and precision.

    Raises:
        ConfigError: The file contradicts the run.
    """
    name = config.engine.deepspeed
    decided: dict[str, Any] = {
        "train_batch_size": plan.global_rows,
        "train_micro_batch_size_per_gpu": plan.rank_rows,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.clip_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "fp16.enabled": False,
        "bf16.enabled": False,
    }
    settings = ds_file(name, plan.chunks)
    # It waits for the device at every forward and update.
    settings.setdefault("timers", {"throughput": {"enabled": False}})
    if dtype != torch.float32:
        decided |= {
            "torch_autocast.enabled": True,
            "torch_autocast.dtype": str(dtype).removeprefix("torch."),
        }
        names = [f"{kind.__module__}.{kind.__name__}" for kind in LOWER_PRECISION_SAFE]
        lower = settings.setdefault("torch_autocast", {})
        lower.setdefault("lower_precision_safe_modules", names)
    return fill(settings, decided, name)
