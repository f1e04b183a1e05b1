"""Frozen teachers of the objective: found by their names, and how the run's batches reach them."""

import hashlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate

from mmscale.config.rules import teacher_terms
from mmscale.config.schema import Config
from mmscale.config.taught import AnchorTerm, TaughtTerm, TeacherTerm
from mmscale.contracts import START, InputSpec, Peers, World
from mmscale.data.features import FeatureTable
from mmscale.data.shards import ShardSet
from mmscale.engine.compiled import caption_lengths
from mmscale.engine.encode import Encoder
from mmscale.engine.inference import Inference
from mmscale.errors import CheckpointError, ConfigError, LaunchError
from mmscale.evaluation.encoded import FeatureCache, add_feeding, add_tensors, cached_table
from mmscale.evaluation.trained import load_named
from mmscale.model.two_tower import TwoTower
from mmscale.parallel.device import DevicePolicy
from mmscale.parallel.peers import gather_objects

_CACHE = "the cache of a teacher in loss.terms"
# A teacher that is opened shall neither take another rank's device nor round its weights.
_ON_THE_CPU = ("engine.device=cpu", "engine.precision=fp32")


@dataclass(frozen=True)
class Teacher:
    """A frozen model, whole on every rank.

    Attributes:
        name: As the objective names it.
        model: In fp32, on the CPU until a part takes it.
        spec: What it is fed.
        width: Of its embeddings.
        digest: Of its weights and of how it reads captions.
    """

    name: str
    model: TwoTower
    spec: InputSpec
    width: int
    digest: str


def taught_terms(config: Config) -> dict[str, list[TaughtTerm]]:
    """A stage's terms by the name of their teacher."""
    found: dict[str, list[TaughtTerm]] = {}
    for term in config.loss.terms:
        if isinstance(term, TeacherTerm):
            found.setdefault(term.model, []).append(term)
        elif isinstance(term, AnchorTerm) and term.data is None:
            found.setdefault(START, []).append(term)
    return found


def open_teachers(config: Config, world: World, say: Callable[[str], None]) -> tuple[Teacher, ...]:
    """Every teacher that a stage's terms name, once each. Collective.

    Args:
        config: The stage's, its preset filled.
        world: The ranks; all must find the same model.
        say: Takes a line about each.

    Raises:
        ConfigError: There is no such model, or its width is not that of the embeddings.
        CheckpointError: Its weights cannot be used.
        LaunchError: Ranks found different ones.
    """
    found: dict[str, Teacher] = {}
    for term in teacher_terms(config):
        if term.model not in found:
            teacher = found[term.model] = open_teacher(term.model)
            size = sum(parameter.numel() for parameter in teacher.model.parameters())
            say(f"teacher: {term.model}, {size:,} parameters, {teacher.width} wide")
        _require_width(term, found[term.model], config.model.embed_dim)
    digests = {name: teacher.digest for name, teacher in found.items()}
    for rank, theirs in enumerate(gather_objects(world, digests)):
        for name in digests:
            if theirs[name] != digests[name]:
                raise LaunchError(
                    f"loss.terms holds teacher with model={name}, which is another model on rank "
                    f"{rank} than on rank {world.rank}; give every node the same files"
                )
    return tuple(found.values())


def cached_features(
    config: Config,
    teachers: tuple[Teacher, ...],
    shards: ShardSet,
    policy: DevicePolicy,
    peers: Peers,
    say: Callable[[str], None],
) -> dict[str, FeatureTable]:
    """What the towers of teachers with a cache make of the training set, by name. Collective.

    Such a teacher sees each picture whole, in its own preprocessing.

    Args:
        config: The stage's.
        teachers: Of the stage.
        shards: The training set.
        policy: Device and precision of the forward.
        peers: The ranks, which share the work.
        say: Takes lines about how far it is.
    """
    folders = {term.model: term.cache for term in teacher_terms(config)}
    tables = {}
    for teacher in teachers:
        if (folder := folders[teacher.name]) is None:
            continue
        call = Inference(teacher.model, policy).call
        encoder = Encoder.of(config, call, policy.device, teacher.spec, peers)
        cache = FeatureCache(
            Path(folder), teacher.model, teacher.spec, config.data.cache_gb * 1e9, _CACHE
        )
        with _naming(teacher.name):
            tables[teacher.name] = cached_table(cache, shards, encoder, say)
    return tables


def open_teacher(name: str) -> Teacher:
    """A teacher by its name.

    Raises:
        ConfigError: There is no such model.
        CheckpointError: Its weights cannot be used.
    """
    with _naming(name):
        loaded = load_named(name, _ON_THE_CPU)
    model, spec = loaded.model, loaded.spec
    model.requires_grad_(False).eval()
    with torch.no_grad():
        features = (torch.zeros(1, tower.width) for tower in (model.vision, model.text))
        width = model("heads", *features)[0].unit.shape[1]
    return Teacher(name, model, spec, width, _digest(model, spec))


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Say of which setting an error is, whose own words are those of a model to be trained."""
    try:
        yield
    except (ConfigError, CheckpointError) as error:
        raise type(error)(f"loss.terms holds teacher with model={name}: {error}") from error


def _require_width(term: TeacherTerm, teacher: Teacher, width: int) -> None:
    if term.form == "feature" and teacher.width != width:
        raise ConfigError(
            f"loss.terms holds teacher with form=feature, but the embeddings are {width} wide and "
            f"those of model={term.model} {teacher.width}; set model.embed_dim={teacher.width}, or "
            f"form=affinity, which compares similarities"
        )


def _digest(model: nn.Module, spec: InputSpec) -> str:
    digest = hashlib.sha256()
    add_feeding(digest, spec)
    add_tensors(digest, model)
    return digest.hexdigest()


class Repainted:
    """Pixels as the trained model takes them, made those that a teacher takes, on their device.

    The teacher sees the crop that the trained model sees: at its own size, with its own mean and
    deviation.
    """

    def __init__(self, own: InputSpec, theirs: InputSpec, device: torch.device):
        """Take both inputs.

        Args:
            own: Of the trained model.
            theirs: Of the teacher.
            device: Where the pixels are.
        """
        self._is_same = (own.mean, own.std) == (theirs.mean, theirs.std)
        self._size = theirs.image_size if theirs.image_size != own.image_size else None
        self._interpolation = theirs.interpolation
        # Sent once: the host would wait for each copy.
        self._own, self._theirs = (
            [torch.tensor(values, device=device)[:, None, None] for values in (spec.mean, spec.std)]
            for spec in (own, theirs)
        )

    def __call__(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 size size"]:
        """What the teacher is fed; the same tensor where both are fed alike."""
        if self._is_same and self._size is None:
            return pixels
        (own_mean, own_std), (mean, std) = self._own, self._theirs
        values = pixels * own_std + own_mean
        if self._size is not None:
            side = (self._size, self._size)
            values = interpolate(values, side, mode=self._interpolation, antialias=True)
            # A bicubic resize overshoots at edges, where bytes would have been cut.
            values = values.clamp_(0, 1)
        return values.sub_(mean).div_(std)


def fed_with(
    spec: InputSpec, teachers: tuple[Teacher, ...], but: Collection[str] = ()
) -> InputSpec:
    """What the trained model is fed, and each teacher's captions besides.

    Args:
        spec: Of the trained model; where it pads captions to fixed lengths, teachers do too.
        teachers: Of the stage.
        but: Names of those whose features are there already.
    """

    def padded(theirs: InputSpec) -> InputSpec:
        fixed = caption_lengths(theirs.context_length) if spec.caption_lengths else ()
        return replace(theirs, caption_lengths=fixed)

    encoding = [teacher for teacher in teachers if teacher.name not in but]
    return replace(spec, teachers={teacher.name: padded(teacher.spec) for teacher in encoding})
