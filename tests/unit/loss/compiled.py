"""Compiles the kernels for an H100, which need not be there: prints what came of each as JSON.

Run as `python -m tests.unit.loss.compiled`.
"""

import json
import re
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmscale.loss.kernels import fused, logits

SIZES = {"b", "n", "d", "first_negative", "columns_of_a_split", "first", "width"}


def compiled(name: str, inputs: str, both: bool) -> dict[str, Any]:
    *blocks, warps = fused.NARROW if inputs == "bf16" else fused.FULL
    constants = dict(zip(("BM", "BN", "BK"), blocks, strict=True))
    constants |= {"PRECISION": "ieee", "BOTH": both}
    kernel = getattr(logits, name)
    kinds = {
        argument: "constexpr"
        if argument in constants
        else "i32"
        if argument in SIZES
        else f"*{inputs}"
        if argument in ("x", "y", "out")
        else "*i64"
        if argument.endswith("_ids")
        else "*fp32"
        for argument in kernel.arg_names
    }
    used = {key: value for key, value in constants.items() if key in kinds}
    found = triton.compile(
        ASTSource(kernel, kinds, used),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps},
    )
    return {
        "kernel": name,
        "inputs": inputs,
        "bytes": len(found.asm["cubin"]),
        "adds_in_memory": bool(re.search(r"\b(atom|red)\.", found.asm["ptx"])),
        "tensor_cores": "mma" in found.asm["ptx"],
    }


def main() -> None:
    kinds = [
        (name, both) for name in ("softmax_sums", "softmax_gradient") for both in (True, False)
    ]
    kinds += [(name, True) for name in ("sigmoid_sums", "sigmoid_gradient")]
    print(json.dumps([compiled(name, i, both) for name, both in kinds for i in ("bf16", "fp32")]))


if __name__ == "__main__":
    main()
