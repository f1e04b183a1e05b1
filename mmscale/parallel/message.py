"""What ranks tell one another, as bytes: JSON, with tensors beside it. Nothing in it is code.

Whoever reaches the address that ranks meet at can send them something, so that it is read as data:
safetensors, whose first tensor is the text.
"""

import json
from typing import Any

import torch
from jaxtyping import UInt8
from safetensors.torch import load, save
from torch import Tensor

_TEXT, _TENSOR = "text", "tensor of this message"


def packed(value: Any) -> UInt8[Tensor, " bytes"]:
    """A value as bytes.

    Args:
        value: Of what JSON has, and tensors. Tuples arrive as lists, keys as text.
    """
    tensors: dict[str, Tensor] = {}

    def stand_in(thing: Any) -> dict[str, str]:
        if not isinstance(thing, Tensor):
            raise TypeError(f"ranks exchange JSON and tensors, not {type(thing).__name__}")
        name = str(len(tensors))
        # Of its own: two views of one storage are refused.
        tensors[name] = thing.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: name}

    text = json.dumps(value, default=stand_in).encode()
    tensors[_TEXT] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return torch.frombuffer(bytearray(save(tensors)), dtype=torch.uint8)


def unpacked(content: UInt8[Tensor, " bytes"]) -> Any:
    """The value that `packed` was given; its tensors are on the CPU."""
    tensors = load(content.numpy().tobytes())

    def put_back(found: dict[str, Any]) -> Any:
        return tensors[found[_TENSOR]] if found.keys() == {_TENSOR} else found

    return json.loads(tensors[_TEXT].numpy().tobytes(), object_hook=put_back)
