"""A tiny dual encoder and fixed rows: what the tests with real processes train."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from mmscale.checkpoint.state import RunState
from mmscale.config.load import validate
from mmscale.config.rules import needs_momentum, needs_momentum_rows
from mmscale.config.schema import Config
from mmscale.config.values import whole_steps
from mmscale.contracts import START, Batch, Peers, World
from mmscale.engine import build
from mmscale.engine.ema import copy_of
from mmscale.engine.fsdp import FsdpEngine
from mmscale.engine.plan import plan_batch
from mmscale.loss.objective import Objective
from mmscale.model.batch_norm import connect_batch_norms
from mmscale.model.build import build_model
from mmscale.parallel.device import choose
from mmscale.parallel.peers import connect
from mmscale.training.part import Step
from mmscale.training.parts.anchors import Anchored, Anchors
from mmscale.training.parts.momentum import Momentum
from mmscale.training.parts.near_start import NearStart
from mmscale.training.parts.prototypes import EpochClusters
from mmscale.training.parts.queue import Queue, RowBank
from mmscale.training.parts.teacher import Teachers
from mmscale.training.step import Learner, train_step
from mmscale.training.teachers import Teacher, taught_terms

ROWS = 12
CPU = torch.device("cpu")
# Of the image tower of a teacher.
TEACHER = {"width": 32, "layers": 1, "head_width": 16, "patch_size": 8, "image_size": 24}


def tiny_config(**settings: Any) -> Config:
    """Two transformers of a few thousand parameters, without dropout."""
    text = {"width": 32, "heads": 2, "layers": 1, "context_length": 16, "vocab_size": 99}
    vision = {"width": 32, "layers": 1, "head_width": 16, "patch_size": 8, "image_size": 16}
    nested: dict[str, Any] = {
        "data": {"train": "unused"},
        "model": {
            "vision": {"name": "openclip:ViT-B-32", "weights": "random", "options": vision},
            "text": {"name": "openclip:ViT-B-32", "weights": "random", "options": text},
            "embed_dim": 16,
        },
        "train": {"global_batch_size": ROWS},
        "optim": {"lr": 1e-2, "clip_norm": 0.5},
    }
    for path, value in settings.items():
        place = nested
        *parts, leaf = path.split("__")
        for part in parts:
            place = place.setdefault(part, {})
        place[leaf] = value
    return validate(nested)


def joint_batch(seed: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
    """All rows of a global batch; two images have several captions."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 98, (ROWS, 10), generator=generator)
    tokens[:, -1] = 98  # the largest id ends a caption
    image_ids = torch.tensor([7, 7, 1, 2, 3, 3, 3, 4, 5, 6, 8, 7])
    return Batch(
        image=torch.randn(ROWS, 3, 16, 16, generator=generator, dtype=dtype),
        tokens=tokens,
        mask=torch.ones_like(tokens, dtype=torch.bool),
        image_ids=image_ids,
        match_ids=image_ids,
        labels=image_ids % 3,
        keys=[f"{seed}-{row}#0" for row in range(ROWS)],
        captions=["a caption"] * ROWS,
        teacher_tokens={"teacher": tokens},
    )


def share(batch: Batch, rank: int, world: int) -> Batch:
    """A rank's neighbouring rows."""
    size = ROWS // world
    rows = slice(rank * size, (rank + 1) * size)
    return Batch(
        image=batch.image[rows],
        tokens=batch.tokens[rows],
        mask=batch.mask[rows],
        image_ids=batch.image_ids[rows],
        match_ids=batch.match_ids[rows],
        labels=batch.labels[rows],
        keys=batch.keys[rows],
        captions=batch.captions[rows],
        teacher_tokens={name: tokens[rows] for name, tokens in batch.teacher_tokens.items()},
    )


def build_engine(config: Config, world: World, kind: str, dtype: torch.dtype = torch.float32):
    """The engine of `config` in a process that has joined its peers."""
    return _with_follower(config, world, kind, dtype)[0]


def _with_follower(
    config: Config, world: World, kind: str, dtype: torch.dtype
) -> tuple[Any, nn.Module | None]:
    """The engine, and what becomes the momentum encoder."""
    model, _ = build_model(config.model, None, 0)
    policy, plan = choose(config.engine), plan_batch(config, world.size)
    model = model.to(dtype).train()
    connect_batch_norms(model, connect(world))
    follower = copy_of(model, share_frozen=True) if needs_momentum(config) else None
    return build.build_engine(kind, model, config, plan, policy, world), follower


def weights(engine: Any) -> dict[str, torch.Tensor]:
    """Every tensor of the engine, whole."""
    return {tensor.name: tensor.value.detach().clone() for tensor in engine.tensors()}


def train(
    rank: int,
    world_size: int,
    kind: str,
    micro: int,
    steps: int,
    settings: dict[str, Any],
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Some updates; returns losses, gradients before the last update, and the weights after it."""
    torch.set_num_threads(1)
    config = tiny_config(**settings, train__micro_batch_size=micro)
    world = World(rank, world_size, rank, "test")
    engine, follower = _with_follower(config, world, kind, dtype)
    peers = connect(world)
    objective = Objective(config, peers)
    parts = [
        *_momentum(engine, follower, config, micro),
        *_queue(config, peers, dtype),
        *_clusters(config, world),
        *_teachers(config, micro, dtype),
        *_near(engine, config, world, dtype),
        *_anchors(config, micro, world, dtype),
    ]
    records, gradients = [], {}
    apply = engine.apply

    def keep_gradients(factor: float, norm: float) -> None:
        gradients.update(read_gradients(engine, kind))
        apply(factor, norm)

    engine.apply = keep_gradients
    for step in range(steps):
        batch = share(joint_batch(step, dtype), rank, world_size)
        records.append(
            train_step(
                Learner(engine, objective, peers, micro), batch, Step(RunState(step), 1e-2), parts
            ).record
        )
    result = {"records": records, "gradients": gradients, "weights": weights(engine)}
    engine.close()
    return result


def _momentum(
    engine: Any, follower: nn.Module | None, config: Config, micro: int
) -> Iterator[Momentum]:
    if follower is not None:
        shadow = engine.shadow(follower)
        queue = config.negatives.queue
        encodes = needs_momentum_rows(config) or (queue.size and queue.source == "momentum")
        decay = config.model.momentum
        yield Momentum(shadow, choose(config.engine), decay, micro, bool(encodes))


def _queue(config: Config, peers: Peers, dtype: torch.dtype) -> Iterator[Queue]:
    queue = config.negatives.queue
    size, unique = queue.slots(ROWS)
    if size:
        bank = RowBank(size, config.model.embed_dim, unique, CPU, dtype)
        share = partial(queue.share.at, steps_of=whole_steps)
        yield Queue(bank, peers, share, queue.source == "momentum")


def _clusters(config: Config, world: World) -> Iterator[EpochClusters]:
    """Of the images of `joint_batch`, made anew every three updates."""
    for term in [term for term in config.loss.terms if term.kind == "prototypes"][:1]:
        yield EpochClusters(term, ROWS, 3, 0, world, connect(world), CPU)


def _teachers(config: Config, micro: int, dtype: torch.dtype) -> Iterator[Teachers]:
    """A model of other weights, pictures and temperature, as wide as ours; the start of another."""
    if terms := taught_terms(config):
        sizes = tiny_config(model__vision__options=TEACHER, model__logit_scale={"init": 5.0})
        model, spec = build_model(sizes.model, None, 5)
        _, own = build_model(config.model, None, 0)
        teacher = Teacher("teacher", model.requires_grad_(False).to(dtype), spec, 16, "")
        policy = choose(config.engine)
        begun, _ = build_model(config.model, None, 6)
        start = Teacher(START, begun.requires_grad_(False).to(dtype), own, 16, "")
        yield Teachers([teacher, start], terms, policy, own, micro, whole_steps)


def _near(engine: Any, config: Config, world: World, dtype: torch.dtype) -> Iterator[NearStart]:
    """The pull to other weights than those that the first update begins with."""
    for term in [term for term in config.loss.terms if term.kind == "l2_start"]:
        begun, _ = build_model(config.model, None, 6)
        yield NearStart(term, engine, begun.to(dtype).state_dict(), world.size, whole_steps)


def _anchors(config: Config, micro: int, world: World, dtype: torch.dtype) -> Iterator[Anchors]:
    """Given pairs whose captions are longer than the batch's, held where another model has them."""
    terms = tuple(t for t in config.loss.terms if t.kind == "anchor" and t.data is not None)
    if terms:
        begun, own = build_model(config.model, None, 6)
        policy = choose(config.engine)
        start = Teacher(START, begun.requires_grad_(False).to(dtype), own, 16, "")
        encoder = Teachers([start], {START: terms}, policy, own, micro, whole_steps)
        stage: Any = SimpleNamespace(
            config=config,
            end=99,
            job=SimpleNamespace(policy=policy),
            spec=own,
            timetable=SimpleNamespace(uncut=whole_steps),
        )
        given = Anchored(terms, _Given(world, dtype), "")
        part = Anchors(stage, {terms[0].data: given}, encoder)
        part.begin(RunState(0))
        yield part


class _Given:
    """In the place of pairs that are drawn from shards."""

    def __init__(self, world: World, dtype: torch.dtype):
        self._world, self._dtype = world, dtype

    def batches(self, updates: range, workers: int) -> Iterator[Batch]:
        for update in updates:
            rows = share(joint_batch(50 + update, self._dtype), self._world.rank, self._world.size)
            more = rows.tokens.new_full((len(rows), 3), 5)
            tokens = torch.cat([more, rows.tokens], dim=1)
            yield replace(rows, tokens=tokens, mask=torch.ones_like(tokens, dtype=torch.bool))


def read_gradients(engine: Any, kind: str) -> dict[str, torch.Tensor]:
    """The averaged gradient of every trained parameter, whole."""
    if isinstance(engine, FsdpEngine):
        whole = {name: share.whole(share.gradient) for name, share in engine._shares.items()}
        return {name: gradient.clone() for name, gradient in whole.items()}
    if kind == "accelerate":
        named = engine.module.named_parameters()
        return {n: p.grad.detach().clone() for n, p in named if p.requires_grad}
    from deepspeed.utils import safe_get_full_grad

    named = engine._engine.module.named_parameters()
    return {n: safe_get_full_grad(p).detach().clone() for n, p in named if p.requires_grad}
