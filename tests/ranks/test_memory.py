"""`mmscale plan` against two real ranks: what they hold and send is within 10 % of the prediction.

Held is what a walk over every tensor of the process finds, and what autograd keeps; sent is what is
handed to torch.distributed.
"""

import os

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

from mmscale.checkpoint.state import RunState
from mmscale.contracts import World
from mmscale.engine.footprint import footprint
from mmscale.engine.memory import Sharding, Workload, holdings
from mmscale.engine.plan import plan_batch
from mmscale.engine.wire import transfers
from mmscale.engine.zero_settings import ds_file
from mmscale.loss.objective import Objective
from mmscale.model.outline import outline
from mmscale.parallel.peers import connect
from mmscale.training.part import Step
from mmscale.training.parts.queue import Queue, RowBank
from mmscale.training.step import Learner, train_step
from tests.ranks.launch import run_on_ranks
from tests.ranks.live import Storages, listening
from tests.ranks.tiny import CPU, ROWS, build_engine, joint_batch, share, tiny_config

WORLD = 2
TOKENS = 10
FILES = {
    0: None,
    1: "ds_configs/zero1.json",
    2: "ds_configs/zero2.json",
    3: "ds_configs/zero3.json",
    "offload": "ds_configs/zero3_offload.json",
}
# Wide enough that what the test itself holds does not count.
SETTINGS = {
    "model__vision__options": {
        "width": 128, "layers": 2, "head_width": 32, "patch_size": 8, "image_size": 16,
    },
    "model__text__options": {
        "width": 128, "heads": 2, "layers": 2, "context_length": 16, "vocab_size": 2000,
    },
}  # fmt: skip
QUEUE = 256


def settings(stage, chunks, **more):
    rows = {"train__micro_batch_size": ROWS // WORLD // chunks}
    file = {"engine__deepspeed": FILES[stage]} if FILES[stage] else {}
    return SETTINGS | rows | file | more


def measured(stage, words, queue):
    """One rank's bytes in the third update, by name, and what it handed to torch.distributed."""
    rank = int(os.environ["RANK"])
    world = World(rank, WORLD, rank, "test")
    config = tiny_config(**words)
    before = Storages()
    with listening() as heard:
        engine = build_engine(config, world, "deepspeed" if stage else "accelerate")
        peers = connect(world)
        objective = Objective(config, peers)
        bank = RowBank(queue, config.model.embed_dim, False, CPU) if queue else None
        found = {}
        apply, backward, call = engine.apply, engine.backward, engine.call

        def spied_apply(factor, norm):
            found.update(persistent(engine, stage, Storages(before), bank))
            apply(factor, norm)

        def spied_backward(loss, last, scaled=False):
            if last:
                weights = list(engine.module.parameters())
                found["whole gradients"] = sum(p.grad.nbytes for p in weights if p.grad is not None)
                found["whole weights"] = sum(p.nbytes for p in weights)
            backward(loss, last, scaled)

        kept = {}

        def spied_call(mode, *inputs):
            saved = kept.setdefault(mode, {})
            saved.clear()
            others = {t.untyped_storage().data_ptr() for t in inputs}

            def pack(tensor):
                # FSDP's shards are views of what is no storage of their own.
                whole = (p for p in engine.module.parameters() if not isinstance(p, DTensor))
                weights = {p.untyped_storage().data_ptr() for p in whole}
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in weights | others:
                    saved[storage.data_ptr()] = storage.nbytes(), storage
                return tensor

            with saved_tensors_hooks(pack, lambda tensor: tensor):
                return call(mode, *inputs)

        for step in range(3):
            if step == 2:
                engine.apply, engine.backward, engine.call = spied_apply, spied_backward, spied_call
            heard.clear()
            batch = share(joint_batch(step), rank, WORLD)
            micro = config.train.micro_batch_size
            with_queue = [Queue(bank, peers, lambda step: 1.0, of_momentum=False)] if bank else []
            train_step(
                Learner(engine, objective, peers, micro),
                batch,
                Step(RunState(step), 1e-2),
                with_queue,
            )
        sizes = {mode: sum(size for size, _ in saved.values()) for mode, saved in kept.items()}
        found["tower activations"] = sizes["image"] + sizes["text"]
        engine.close()
    return found, dict(heard)


def persistent(engine, stage, live, bank):
    """Bytes by name at the end of the last backward; `left` is what has none."""
    if not stage:
        return persistent_in_fsdp(engine, live, bank)
    weights = list(engine.module.parameters())
    shards = [p.ds_tensor for p in weights if hasattr(p, "ds_tensor")]
    found = {"whole weights": live.take(weights)} if shards else {}
    found["weights"] = live.take([*(shards or weights), *engine.module.buffers()])
    found["gradients"] = live.take([p.grad for p in weights if p.grad is not None])
    if bank is not None:
        found["queue"] = live.take(bank.tensors().values())
    zero = engine._zero
    three = hasattr(zero, "fp32_partitioned_groups_flat")
    masters = zero.fp32_partitioned_groups_flat if three else zero.single_partition_of_fp32_groups
    found["masters"] = live.take(masters)
    found["gradients"] += live.take([m.grad for m in masters if m.grad is not None])
    if three:
        found["gradients"] += live.take([zero.grad_partitions_flat_buffer])
    else:
        parts = zero.averaged_gradients.values()
        found["gradients"] += live.take(g for part in parts if part for g in part if g is not None)
    states = zero.optimizer.state.values()
    found["optimizer"] = live.take(v for state in states for v in state.values())
    buffers = (bucket.buffer for bucket in zero.ipg_buckets.values())
    found["buckets"] = live.take(
        tensor for b in buffers for tensor in (b if isinstance(b, list) else [b])
    )
    return found | {"left": live.left}


def persistent_in_fsdp(engine, live, bank):
    """Likewise, of FSDP2."""
    shares = engine._shares.values()
    states = engine._optimizer.state.values()
    return {
        "weights": live.take([*(share.master for share in shares), *engine.module.buffers()]),
        "gradients": live.take(share.gradient for share in shares),
        "queue": live.take(bank.tensors().values()) if bank is not None else 0,
        "optimizer": live.take(v for state in states for v in state.values()),
        "left": live.left,
    }


def predicted(stage, words, queue):
    config = tiny_config(**words)
    plan = plan_batch(config, WORLD)
    zero = ds_file(FILES[stage], plan.chunks)["zero_optimization"] if stage else {}
    sharding = Sharding(str(stage), zero.get("stage", 0), zero)
    seen = footprint(*outline(config.model, None), config, plan, TOKENS, torch.float32)
    work = Workload(seen, config, plan, queue, torch.float32)
    return {h.name: h.bytes for h in holdings(work, sharding)}, transfers(work, sharding)


CASES = [(0, 3, QUEUE), (1, 1, 0), (2, 3, 0), (3, 1, 0)]
MORE = [(0, 1, 0), (1, 3, 0), (2, 1, QUEUE), (3, 3, 0), ("offload", 1, 0), ("offload", 3, 0)]


@pytest.mark.parametrize(
    ("stage", "chunks", "queue"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
)
def test_two_ranks_hold_and_send_what_is_predicted(stage, chunks, queue):
    words = settings(stage, chunks, **({"negatives__queue": _queue(queue)} if queue else {}))
    expected, sends = predicted(stage, words, queue)
    results = run_on_ranks(WORLD, measured, stage, words, queue)
    names = ["weights", "gradients", "optimizer", "masters", "tower activations"]
    most = {n: max(found.get(n, 0) for found, _ in results) for n in (*names, "left")}
    if stage == 0:
        most["whole weights"] = max(found["whole weights"] for found, _ in results)
        names.append("whole weights")
    if stage in (0, 1) and chunks > 1:
        most["gradients"] = max(found["whole gradients"] for found, _ in results)
    for name in names:
        assert most[name] == pytest.approx(expected.get(name, 0), rel=0.1), name
    assert most["left"] < 0.02 * sum(expected[n] for n in ("weights", "optimizer"))
    if stage in (3, "offload"):
        assert max(found["buckets"] for found, _ in results) == expected["buckets"]
    if queue:
        # The prediction counts the copy that the loss looks at.
        held = max(found["queue"] for found, _ in results)
        assert 2 * held == pytest.approx(expected["queue"], rel=0.01)
    for collective in ("all-gather", "reduce-scatter", "all-reduce"):
        wanted = sum(t.times * t.payload for t in sends if t.collective == collective)
        heard = {calls.get((collective, "bytes"), 0) for _, calls in results}
        assert max(heard) == pytest.approx(wanted, rel=0.1, abs=2048), collective


def _queue(size):
    return {"size": size, "source": "online"}
