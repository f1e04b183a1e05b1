"""The tables and the JSON of `mmscale plan`: every figure predicted, each with its formula."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from mmscale.engine.forecast import FILES, Forecast, device_bytes
from mmscale.engine.memory import Holding
from mmscale.engine.wire import FORMULA, StepTime, Transfer
from mmscale.report.console import duration
from mmscale.report.metrics import in_columns

UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def tables(plan: Forecast, formulas: bool) -> str:
    """Everything as text, first what follows from it."""
    return "\n".join(_lines(plan, formulas))


def _lines(plan: Forecast, formulas: bool) -> Iterator[str]:
    yield from _conclusion(plan)
    yield ""
    yield from _facts(plan)
    yield ""
    yield f"memory a rank, predicted ({plan.batch.world} ranks; configured: {plan.chosen})"
    yield in_columns(list(_memory_rows(plan)))
    yield from _formulas(plan.memory) if formulas else ()
    yield ""
    yield f"sent by a rank in one update, predicted ({plan.batch.world} ranks, ring algorithms)"
    yield in_columns(list(_wire_rows(plan))) if any(plan.wire.values()) else "nothing: one rank"
    yield from _formulas(plan.wire) if formulas else ()
    yield ""
    yield from _efficiency(plan)
    yield f"  {FORMULA}" if formulas else "every figure is predicted; --formulas shows how"


def _conclusion(plan: Forecast) -> Iterator[str]:
    batch, cluster, chosen = plan.batch, plan.cluster, plan.chosen
    yield (
        f"fits: {chosen} keeps {bytes_as_text(plan.room[chosen])} of {cluster.memory_gb:g} GB on "
        f"{'each of ' * (batch.world > 1)}{_count(batch.world, 'GPU')} ({cluster.name})"
    )
    if chosen in plan.here:
        update = plan.here[chosen].seconds
        yield (
            f"time: an epoch about {_span(update * plan.data.steps_per_epoch)}, the run about "
            f"{_span(update * plan.data.steps)}, {batch.global_rows / update:,.0f} pairs/s at "
            f"{cluster.utilisation:.0%} of the peak; reading and evaluation are not counted"
        )
    yield from (f"take: {advice}" for advice in _advice(plan))


def _span(seconds: float) -> str:
    return duration(seconds) if seconds >= 60 else f"{seconds:.2g} s"


def _advice(plan: Forecast) -> Iterator[str]:
    fastest, chosen, batch = plan.fastest, plan.chosen, plan.batch
    if fastest != chosen:
        gain = (
            f"{plan.here[chosen].seconds / plan.here[fastest].seconds:.2f} times as fast"
            if chosen in plan.here
            else "nothing moves to the host"
        )
        size = bytes_as_text(plan.room[fastest])
        yield f"engine.deepspeed={FILES.get(fastest, 'null')}: {gain}, and fits with {size}"
    if plan.chunks_wanted < batch.chunks:
        spares = ", which spares the second forward" if plan.chunks_wanted == 1 else ""
        yield (
            f"train.micro_batch_size={batch.rank_rows // plan.chunks_wanted} instead of "
            f"{batch.micro_rows}: it fits too{spares}"
        )


def _facts(plan: Forecast) -> Iterator[str]:
    data, seen, batch = plan.data, plan.seen, plan.batch
    yield f"batch: {batch}"
    if held := seen.passed - batch.rank_rows:
        yield f"held: {held:,} more rows on each rank in every update, of an anchor's data"
    shards = "shards unknown" if data.shards is None else _count(data.shards, "shard")
    lanes = "" if data.shards is None else f", {data.shards / batch.lanes:.2f} a lane"
    yield f"data: {data.images:,} images an epoch, {shards}{lanes}"
    yield f"epoch: {_count(data.steps_per_epoch, 'step')}"
    yield f"length: {_count(data.steps, 'step')}, {data.steps * batch.global_rows:,} pairs in all"
    yield (
        f"parameters: {seen.numel(True):,} trained, {seen.numel(False):,} frozen; products in "
        f"{plan.precision}, captions of {seen.tokens} tokens"
    )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _memory_rows(plan: Forecast) -> Iterator[list[str]]:
    names = list(plan.memory)
    yield ["", *names]
    held = {name: {h.name: h for h in plan.memory[name]} for name in names}
    for kind in _kinds(plan.memory):
        yield [kind, *(_held(held[name].get(kind)) for name in names)]
    yield ["on the device", *(bytes_as_text(device_bytes(plan.memory[name])) for name in names)]


def _held(holding: Holding | None) -> str:
    if holding is None:
        return "-"
    return (
        f"({bytes_as_text(holding.bytes)} host)" if holding.host else bytes_as_text(holding.bytes)
    )


def _wire_rows(plan: Forecast) -> Iterator[list[str]]:
    names = list(plan.wire)
    yield ["", "collective", *names]
    sent = {name: {t.name: t for t in plan.wire[name]} for name in names}
    for kind in _kinds(plan.wire):
        found = [sent[name].get(kind) for name in names]
        collectives = {transfer.collective: None for transfer in found if transfer}
        yield [kind, " or ".join(collectives), *(_sent(t, plan.batch.world) for t in found)]
    totals = (sum(t.sent(plan.batch.world) for t in plan.wire[name]) for name in names)
    yield ["in all", "", *map(bytes_as_text, totals)]


def _sent(transfer: Transfer | None, world: int) -> str:
    if transfer is None:
        return "-"
    times = f"{transfer.times} x " if transfer.times > 1 else ""
    return times + bytes_as_text(transfer.sent(world) // transfer.times)


def _kinds(groups: dict[str, Any]) -> list[str]:
    """Names of all groups' entries, each where it first stands."""
    return list(dict.fromkeys(entry.name for group in groups.values() for entry in group))


def _formulas(groups: dict[str, Any]) -> Iterator[str]:
    found: dict[str, dict[str, None]] = {}
    for group in groups.values():
        for entry in group:
            found.setdefault(entry.name, {})[entry.formula] = None
    for name, formulas in found.items():
        yield f"  {name}: {'; or '.join(formulas)}"


def _efficiency(plan: Forecast) -> Iterator[str]:
    cluster, precision = plan.cluster, plan.precision
    yield (
        f"efficiency on {cluster.name}, predicted: each GPU keeps {plan.batch.rank_rows} rows; "
        f"peak {getattr(cluster.peak_tflops, precision):g} TFLOP/s {precision}, utilisation "
        f"{cluster.utilisation:g}, {cluster.within_node_gb_per_s:g} GB/s a GPU in a node, "
        f"{cluster.between_nodes_gb_per_s:g} GB/s a node outside, link share {cluster.link_share:g}"
    )
    gpus = [step.gpus for step in next(iter(plan.steps.values()))]
    rows = [["GPUs", *(f"{count:,}" for count in gpus)]]
    for name, steps in plan.steps.items():
        rows.append([name, *(f"{step.efficiency:.1%}" for step in steps)])
    rows += (
        [
            [
                f"pairs/s, {plan.chosen}",
                *(f"{s.samples_per_second:,.0f}" for s in plan.steps[plan.chosen]),
            ]
        ]
        if plan.chosen in plan.steps
        else []
    )
    yield in_columns(rows)


def bytes_as_text(size: float) -> str:
    """Bytes as a reader takes them in."""
    for unit, name in UNITS:
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:.0f} B"


def plan_json(plan: Forecast) -> dict[str, Any]:
    """Everything as `--json` writes it."""
    return {
        "predicted": True,
        "batch": _batch(plan),
        "data": _data(plan),
        "parameters": {"trained": plan.seen.numel(True), "frozen": plan.seen.numel(False)},
        "precision": plan.precision,
        "tokens": plan.seen.tokens,
        "chosen": plan.chosen,
        "conclusion": {
            "bytes": plan.room[plan.chosen],
            "seconds_per_update": plan.here[plan.chosen].seconds
            if plan.chosen in plan.here
            else None,
            "take": list(_advice(plan)),
        },
        "memory": {name: [asdict(h) for h in held] for name, held in plan.memory.items()},
        "wire": {
            name: [_transfer(t, plan.batch.world) for t in sent] for name, sent in plan.wire.items()
        },
        "efficiency": {
            "formula": FORMULA,
            "cluster": plan.cluster.model_dump(mode="json"),
            "steps": {name: [_step(s) for s in steps] for name, steps in plan.steps.items()},
        },
    }


def _batch(plan: Forecast) -> dict[str, Any]:
    batch = plan.batch
    return {
        "ranks": batch.world,
        "rank_rows": batch.rank_rows,
        "held_rows": plan.seen.passed - batch.rank_rows,
        "micro_rows": batch.micro_rows,
        "chunks": batch.chunks,
        "global_rows": batch.global_rows,
        "lanes": batch.lanes,
    }


def _data(plan: Forecast) -> dict[str, Any]:
    data = plan.data
    return {
        "images": data.images,
        "shards": data.shards,
        "shards_per_lane": None if data.shards is None else data.shards / plan.batch.lanes,
        "steps_per_epoch": data.steps_per_epoch,
        "steps": data.steps,
    }


def _transfer(transfer: Transfer, world: int) -> dict[str, Any]:
    return {
        "name": transfer.name,
        "collective": transfer.collective,
        "payload_bytes": transfer.payload,
        "times": transfer.times,
        "sent_bytes": transfer.sent(world),
        "overlaps_backward": transfer.overlaps,
        "formula": transfer.formula,
    }


def _step(step: StepTime) -> dict[str, Any]:
    return {
        "gpus": step.gpus,
        "global_rows": step.global_rows,
        "compute_s": step.compute,
        "exposed_s": step.exposed,
        "efficiency": step.efficiency,
        "samples_per_second": step.samples_per_second,
    }
