"""Given pairs that stay where the run's start had them, whether it trains on them or not."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mmscale.checkpoint.state import RunState
from mmscale.config.taught import AnchorTerm
from mmscale.contracts import START, Batch, Features, LossInput, Taught
from mmscale.data.drawn import DrawnPairs
from mmscale.data.features import FeatureTable
from mmscale.data.shard_set import ShardSet
from mmscale.data.shards import open_shards
from mmscale.engine.encode import Encoder
from mmscale.engine.feed import on_device
from mmscale.engine.inference import Inference
from mmscale.engine.plan import held_rows
from mmscale.errors import ConfigError
from mmscale.evaluation.encoded import FeatureCache, Tell, cached_table
from mmscale.training.part import Json, Part, Step
from mmscale.training.parts.teacher import Teachers
from mmscale.training.stage import Stage
from mmscale.training.teachers import Teacher


@dataclass(frozen=True)
class Anchored:
    """One set of given pairs.

    Attributes:
        terms: Those that look at it.
        pairs: What an update sees of it.
        digest: Of its shards.
    """

    terms: tuple[AnchorTerm, ...]
    pairs: DrawnPairs
    digest: str


class Anchors(Part):
    """Sends given pairs with the batch through the model, and through the run's start.

    The start is asked anew each time: its weights are in every checkpoint, so that nothing else
    has to outlive a stop.
    """

    name = "anchors"

    def __init__(self, stage: Stage, sets: Mapping[str, Anchored], start: Teachers):
        """Take the sets.

        Args:
            stage: Says how far to draw, and where the model computes.
            sets: By the place that terms name.
            start: Encodes with the run's start.
        """
        self._sets, self._start, self._stage = sets, start, stage
        self._drawn: dict[str, Iterator[Batch]] = {}
        self._batches: dict[str, Batch] = {}
        self._taught: dict[str, Taught] = {}

    def begin(self, state: RunState) -> None:
        updates = range(state.step, self._stage.end)
        workers = 0 if self._stage.config.data.workers == 0 else 1
        self._drawn = {
            place: one.pairs.batches(updates, workers) for place, one in self._sets.items()
        }

    def before(self, step: Step, batch: Batch) -> None:
        self._batches, self._taught = {}, {}
        steps_of, policy = self._stage.timetable.uncut, self._stage.job.policy
        for place, one in self._sets.items():
            drawn = next(self._drawn[place])
            if any(term.weight.at(step.number, steps_of) for term in one.terms):
                self._batches[place] = on_device(drawn, policy.device, self._stage.spec)
                self._taught[place] = self._start.encode(START, self._batches[place])

    def beside(self, step: Step) -> Mapping[str, Batch]:
        return self._batches

    def inputs(self, rows: LossInput, features: Features, batch: Batch) -> LossInput:
        found = {
            place: replace(rows.beside[place], teachers={START: taught})
            for place, taught in self._taught.items()
        }
        return replace(rows, beside={**rows.beside, **found})

    def state(self) -> dict[str, Json]:
        return {"digests": {place: one.digest for place, one in self._sets.items()}}

    def load(self, state: Mapping[str, Json]) -> None:
        for place, digest in state["digests"].items():
            if place in self._sets and self._sets[place].digest != digest:
                raise ConfigError(
                    f"loss.terms holds anchor with data={place}, which holds other shards than "
                    "those that the run was trained with; put them back, or start another run.dir"
                )

    def close(self) -> None:
        self._drawn.clear()


def anchors_of(stage: Stage, tell: Tell) -> Iterator[Anchors]:
    """The part, where a term holds given pairs. Collective.

    Args:
        stage: With its terms.
        tell: Takes lines about features that are computed.

    Raises:
        ConfigError: An update has another number of them than ranks can share, or two terms
            want different numbers of one set.
        DataError: There are no such shards, or too few pairs in them.
    """
    terms: dict[str, list[AnchorTerm]] = {}
    for term in stage.config.loss.terms:
        if isinstance(term, AnchorTerm) and term.data is not None:
            terms.setdefault(term.data, []).append(term)
    for start in (teacher for teacher in stage.teachers if teacher.name == START):
        if terms:
            encoder = Teachers(
                [start],
                {START: [term for every in terms.values() for term in every]},
                stage.job.policy,
                stage.spec,
                stage.plan.micro_rows,
                stage.timetable.uncut,
            )
            rows = held_rows(stage.config, stage.job.world.size)
            sets = {
                place: _anchored(stage, every, rows[place], start, tell)
                for place, every in terms.items()
            }
            yield Anchors(stage, sets, encoder)


def _anchored(
    stage: Stage, terms: list[AnchorTerm], count: int, start: Teacher, tell: Tell
) -> Anchored:
    place = str(terms[0].data)
    world, rows = stage.job.world, terms[0].given_rows
    shards = open_shards("an anchor's data", place)
    if shards.samples < rows:
        raise ConfigError(
            f"loss.terms holds anchor with data={place} and rows={rows}, but it has "
            f"{shards.samples} images; give fewer rows"
        )
    share = slice(world.rank * count, (world.rank + 1) * count)
    table = _features(stage, shards, start, tell)
    pairs = DrawnPairs(shards, stage.spec, stage.config.run.seed, rows, share, table)
    return Anchored(tuple(terms), pairs, shards.digest)


def _features(stage: Stage, shards: ShardSet, start: Teacher, tell: Tell) -> FeatureTable | None:
    """What frozen towers make of a set, where the batch comes out of a cache too. Collective."""
    config, job = stage.config, stage.job
    if config.data.feature_cache is None:
        return None
    # No stage has trained the towers: those of the start are the model's, and whole on any engine.
    call = Inference(start.model, job.policy).call
    encoder = Encoder.of(config, call, job.policy.device, stage.spec, job.peers)
    limit = config.data.cache_gb * 1e9
    cache = FeatureCache(Path(config.data.feature_cache), start.model, stage.spec, limit)
    return cached_table(cache, shards, encoder, tell)
