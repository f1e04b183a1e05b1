"""Which engine a run has."""

from torch import nn

from mmscale.config.schema import Config
from mmscale.contracts import World
from mmscale.engine.plan import BatchPlan
from mmscale.engine.protocol import Engine
from mmscale.parallel.device import DevicePolicy


def build_engine(
    kind: str, model: nn.Module, config: Config, plan: BatchPlan, policy: DevicePolicy, world: World
) -> Engine:
    """DeepSpeed's; else FSDP2 on several ranks, and accelerate's on one.

    Args:
        kind: As `engine_kind` says.
        model: Whole, with the weights that it begins with.
        config: The run, or its stage.
        plan: Its batch.
        policy: This rank's device.
        world: All ranks, joined.
    """
    # Imported here: each engine's library is needed by its own runs only.
    if kind == "deepspeed":
        from mmscale.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(model, config, plan, policy, world)
    if world.size > 1:
        from mmscale.engine.fsdp import FsdpEngine

        return FsdpEngine(model, config, policy, world)
    from mmscale.engine.accelerate import AccelerateEngine

    return AccelerateEngine(model, config, policy, world)
