"""One small forward and backward on the CPU before a run: which operations does the model use?"""

import torch

from mmscale.contracts import InputSpec
from mmscale.dist.device import DevicePolicy
from mmscale.dist.fallback import fall_back_line, operations
from mmscale.model.dual_encoder import Tokenizer
from mmscale.model.two_tower import TwoTower


def gaps_line(model: TwoTower, spec: InputSpec, policy: DevicePolicy) -> str | None:
    """The warning of operations that the device lacks and the CPU does in its place."""
    if not policy.has_gaps:
        return None
    return fall_back_line(operations(lambda: rehearse(model, spec)), policy.device.type)


def rehearse(model: TwoTower, spec: InputSpec) -> None:
    """Two pairs through the model and back; weights and random state are as before."""
    pixels = torch.zeros(2, 3, spec.image_size, spec.image_size)
    tokens = Tokenizer(spec)(["a dog runs", "two children play in the deep snow"])
    with torch.random.fork_rng(devices=[]):
        image, text, *_ = model("both", pixels, tokens, tokens != spec.pad_token)
        (image.unit @ text.unit.T).sum().backward()
    model.zero_grad()
