"""What an update uses beside the model, built as configured and as a checkpoint left it."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from mmscale.config.loss import PrototypesTerm
from mmscale.config.needs import fusion_heads, needs_momentum_rows
from mmscale.config.ramp import StepsOf
from mmscale.config.schema import Config
from mmscale.contracts import Engine, World
from mmscale.dist.device import DevicePolicy
from mmscale.engine import bank, clusters
from mmscale.engine.bank import RowBank
from mmscale.engine.clusters import EpochClusters
from mmscale.engine.companions import Companions
from mmscale.engine.matching import Matcher
from mmscale.engine.momentum import MomentumEncoder
from mmscale.engine.plan import BatchPlan

# Tensors of a checkpoint by their prefix.
Restored = Callable[[str], Mapping[str, Tensor]]


def build_companions(
    config: Config,
    engine: Engine,
    follower: nn.Module | None,
    policy: DevicePolicy,
    plan: BatchPlan,
    world: World,
    images: int,
    steps: int,
    steps_of: StepsOf,
    restored: Restored | None,
) -> Companions:
    """Build what the configuration asks for.

    Args:
        config: The run.
        engine: Holds the model.
        follower: What becomes the momentum encoder, where one is wanted.
        policy: Device and precision.
        plan: Rows at once.
        world: All ranks.
        images: Of the training set.
        steps: Updates an epoch.
        steps_of: A duration in updates.
        restored: What the run goes on from; holds nothing where a stage begins.
    """
    queue = config.negatives.queue
    return Companions(
        momentum=None if follower is None else _momentum(config, engine, follower, policy, plan),
        momentum_rows=needs_momentum_rows(config),
        matcher=_matcher(config, plan),
        bank=_bank(config, images, engine.device, restored),
        bank_momentum=queue.size != 0 and queue.source == "momentum",
        bank_share=partial(queue.share.at, steps_of=steps_of),
        clusters=_clusters(config, images, steps, world, engine.device, restored),
    )


def _momentum(
    config: Config, engine: Engine, follower: nn.Module, policy: DevicePolicy, plan: BatchPlan
) -> MomentumEncoder:
    shadow = engine.shadow(follower)
    return MomentumEncoder(shadow, policy, config.model.momentum, plan.micro_rows)


def _matcher(config: Config, plan: BatchPlan) -> Matcher | None:
    heads = fusion_heads(config)
    if not heads:
        return None
    return Matcher(config.run.seed, plan.micro_rows, negatives="matching" in heads)


def _bank(
    config: Config, images: int, device: torch.device, restored: Restored | None
) -> RowBank | None:
    size, unique = bank.slots(config.negatives.queue.size, images)
    if not size:
        return None
    rows = RowBank(size, config.model.embed_dim, unique, device)
    if restored is not None and (kept := restored(bank.PREFIX)):
        rows.restore(kept)
    return rows


def _clusters(
    config: Config,
    images: int,
    steps: int,
    world: World,
    device: torch.device,
    restored: Restored | None,
) -> EpochClusters | None:
    for term in config.loss.terms:
        if isinstance(term, PrototypesTerm):
            found = EpochClusters(term, images, steps, config.run.seed, world, device)
            if restored is not None and (kept := restored(clusters.PREFIX)):
                found.restore(kept)
            return found
    return None
