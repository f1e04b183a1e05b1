"""What known GPUs compute at most, in 10^12 FLOP/s of dense products.

Source: NVIDIA's datasheets of each; where they state figures with sparsity, half of them.
"""

import re

_H100_SXM = {"bf16": 989.0, "fp16": 989.0, "tf32": 494.7, "fp32": 67.0}
_PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    (r"H100 PCIe", {"bf16": 756.0, "fp16": 756.0, "tf32": 378.0, "fp32": 51.0}),
    (r"H100 NVL", {"bf16": 835.5, "fp16": 835.5, "tf32": 417.5, "fp32": 60.0}),
    (r"H100", _H100_SXM),
    (r"H200 NVL", {"bf16": 835.5, "fp16": 835.5, "tf32": 417.5, "fp32": 60.0}),
    (r"H200", _H100_SXM),
    (r"A100", {"bf16": 312.0, "fp16": 312.0, "tf32": 156.0, "fp32": 19.5}),
    (r"L40S", {"bf16": 362.05, "fp16": 362.05, "tf32": 183.0, "fp32": 91.6}),
    (r"L4$", {"bf16": 121.0, "fp16": 121.0, "tf32": 60.0, "fp32": 30.3}),
    (r"T4$", {"fp16": 65.0, "fp32": 8.1}),
    (r"V100-SXM2", {"fp16": 125.0, "fp32": 15.7}),
)


def peak_flops(name: str, precision: str) -> float | None:
    """FLOP/s of a GPU by the name that its driver gives; None where it is not known.

    Args:
        name: Such as `NVIDIA A100-SXM4-80GB`.
        precision: `bf16`, `fp16`, `tf32` or `fp32`.
    """
    for pattern, peaks in _PEAKS:
        if re.search(rf"\b{pattern}", name):
            tera = peaks.get(precision)
            return None if tera is None else 1e12 * tera
    return None
