"""Before the first update: heads fitted to the stream's first rows, and a rehearsal on MPS.

A rehearsal is one small update on a device whose operations have gaps.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mmscale.config.schema import Config
from mmscale.contracts import Batch, InputSpec, Peers, Position
from mmscale.engine.feed import images_on
from mmscale.engine.inference import Inference
from mmscale.model.build import build_model
from mmscale.model.dual_encoder import Tokenizer
from mmscale.model.heads import Head
from mmscale.model.two_tower import TwoTower
from mmscale.parallel.device import DevicePolicy, fall_back_line, operations


def fit_heads(
    model: Any,
    inference: Inference,
    stream: Any,
    peers: Peers,
    micro_rows: int,
    spec: InputSpec,
) -> None:
    """Fit each head that asks for it, equally on every rank. Collective.

    All ranks hold all rows, in the order that they have at any world size, and compute the same;
    rank 0's result is then taken everywhere, since machines may differ in the last digit.

    Args:
        model: A `TwoTower`; its batch normalisations are not connected to peers yet.
        inference: Calls it.
        stream: The training stream, whose first batches are looked at.
        peers: The ranks that hold the rows.
        micro_rows: Rows forwarded at once.
        spec: What the towers are fed.
    """
    heads = {name: head for name, head in model.head.items() if isinstance(head, Head)}
    wanted = max((head.fit_rows for head in heads.values()), default=0)
    if wanted == 0:
        return
    batches: Iterator[tuple[Batch, Position]] = stream.batches(Position())
    parts: dict[str, list[Tensor]] = {"image": [], "text": []}
    for _ in range(-(-wanted // stream.schedule.batch_rows)):
        features = _features(inference, next(batches)[0], micro_rows, spec)
        for name, rows in zip(parts, features, strict=True):
            parts[name].append(peers.columns(rows))
    del batches
    fitted = {name: head for name, head in heads.items() if head.fit_rows}
    wide = {name: _wide(torch.cat(parts[name]), inference.device) for name in fitted}
    if all(head.init == "cca" for head in fitted.values()):
        heads["image"].fit_with(heads["text"], wide["image"], wide["text"])
    else:
        for name, head in fitted.items():
            head.fit(wide[name])
    for head in fitted.values():
        for tensor in head.state_dict().values():
            tensor.copy_(peers.columns(tensor.detach().clone())[: len(tensor)])


def _wide(rows: Tensor, device: torch.device) -> Tensor:
    return rows.to(device, torch.promote_types(rows.dtype, torch.float32))


def _features(
    inference: Inference, batch: Batch, micro_rows: int, spec: InputSpec
) -> tuple[Tensor, Tensor]:
    if batch.mask is None:
        return batch.image.cpu(), batch.tokens.cpu()
    device, images, texts = inference.device, [], []
    for start in range(0, len(batch), micro_rows):
        rows = slice(start, start + micro_rows)
        tokens, mask = batch.tokens[rows].to(device), batch.mask[rows].to(device)
        images.append(inference.call("image", images_on(batch.image[rows], device, spec)).cpu())
        texts.append(inference.call("text", tokens, mask).cpu())
    return torch.cat(images), torch.cat(texts)


def gaps_line(model: TwoTower, spec: InputSpec, policy: DevicePolicy) -> str | None:
    """The warning of operations that the device lacks and the CPU does in its place."""
    if not policy.has_gaps:
        return None
    return fall_back_line(operations(lambda: rehearse(model, spec)), policy.device.type)


def update_fault(run: Config, policy: DevicePolicy) -> str | None:
    """What keeps a device from an update of the run's model, in one line; None where nothing does.

    Args:
        run: Its configuration, presets filled.
        policy: The device.
    """
    size, seed = run.data.image_size, run.run.seed
    model, spec = build_model(run.model, size, seed, fill=False)
    try:
        rehearse(model.to(policy.device).train(), spec)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None


def rehearse(model: TwoTower, spec: InputSpec) -> None:
    """Two pairs through the model and back; weights and random state are as before."""
    device = next(model.parameters()).device
    pixels = torch.zeros(2, 3, spec.image_size, spec.image_size, device=device)
    tokens = Tokenizer(spec)(["a dog runs", "two children play in the deep snow"]).to(device)
    with torch.random.fork_rng(devices=[]):
        image, text, *_ = model("both", pixels, tokens, tokens != spec.pad_token)
        (image.unit @ text.unit.T).sum().backward()
    model.zero_grad()
