"""Triton kernels of losses, imported only where a CUDA device runs them."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from mmscale.parallel.device import has_tensor_cores


def run_on(rows: Tensor) -> bool:
    """Whether the kernels take such rows: on a CUDA device that they are made for, not in fp64."""
    return rows.device.type == "cuda" and rows.dtype != torch.float64 and _are_here()


@cache
def _are_here() -> bool:
    return find_spec("triton") is not None and has_tensor_cores()
