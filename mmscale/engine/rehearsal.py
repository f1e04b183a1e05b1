"""One small update before a run, on a device whose operations have gaps: MPS."""

import torch

from mmscale.config.schema import Config
from mmscale.contracts import InputSpec
from mmscale.model.build import build_model
from mmscale.model.dual_encoder import Tokenizer
from mmscale.model.two_tower import TwoTower
from mmscale.parallel.device import DevicePolicy, fall_back_line, operations


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
