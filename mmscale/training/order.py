"""The order of a stage's data, and what of it is alike."""

from pathlib import Path

from mmscale.config.data import OWN_MODEL
from mmscale.config.schema import Config
from mmscale.contracts import World
from mmscale.data.arrange import Neighbours, read_neighbours
from mmscale.data.features import FeatureTable
from mmscale.data.schedule import Schedule, plan_schedule
from mmscale.engine.encode import Encoder
from mmscale.evaluation.encoded import Tell, own_neighbours
from mmscale.parallel.peers import broadcast_object
from mmscale.training.stage import Job, Start


def schedule_of(job: Job, number: int, table: Neighbours | None, say: Tell) -> Schedule:
    """The order of a stage's data, with what is alike together where a table says what is."""
    config, lanes = job.stages[number], job.plans[number].lanes
    if table is None:
        return plan_schedule(config, job.shards, lanes) if number else job.schedule
    say(f"hard batches: neighbours from {config.data.hard_batches.table}")
    schedule = plan_schedule(config, job.shards, lanes, table)
    say(f"hard batches: {schedule.with_neighbours:.0%} of the images have neighbours")
    return schedule


def own_order(
    job: Job, number: int, encoder: Encoder, features: FeatureTable | None, say: Tell
) -> Schedule:
    """The order of a stage's data with what the model as it is finds alike together. Collective."""
    say("hard batches: neighbours by the model as it is now")
    config, lanes = job.stages[number], job.plans[number].lanes
    by = config.data.hard_batches.by
    table = own_neighbours(encoder, job.shards, features, by, job.world, say)
    return plan_schedule(config, job.shards, lanes, table)


def neighbours_of(config: Config, world: World, start: Start) -> Neighbours | None:
    """The table that the stage began with, else the one that it is given; equal on every rank.

    None without any yet.
    """
    hard = config.data.hard_batches
    if hard.table is None:
        return None
    if start.checkpoint is not None:
        return Neighbours.of(start.checkpoint.tensors_of("hard_batches"))
    if hard.table == OWN_MODEL:
        return None
    read = read_neighbours(Path(hard.table), hard.by).tensors() if world.is_main else None
    return Neighbours.of(broadcast_object(world, read))
