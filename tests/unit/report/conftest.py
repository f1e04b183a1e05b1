import math

import pytest


@pytest.fixture
def histograms():
    """Similarity histograms as an evaluation leaves them."""
    edges = [-1.0, -0.5, 0.0, 0.5, 1.0]
    return {
        "matched": {"edges": edges, "counts": [0, 1, 4, 5]},
        "unmatched": {"edges": edges, "counts": [3, 40, 42, 5]},
        "width": 64,
        "images": 10,
        "captions": 50,
    }


@pytest.fixture
def run_lines():
    """The metric lines of a short finished run."""
    lines = []
    for step in range(1, 41):
        lines.append(
            {
                "step": step,
                "samples": 32 * step,
                "loss": 3.4 * math.exp(-step / 20),
                "lr": 1e-3 / step,
                "logit_scale": 14 + step / 10,
                "grad_norm": 1.2,
                "grad_norm_vision": 1.0 + step % 3,
                "grad_norm_text": 0.5,
                "samples_per_second": 64.0,
                "data_wait": 0.1,
                "keys_digest": "00ff",
            }
        )
        if step % 10 == 0:
            lines.append(
                {
                    "step": step,
                    "health/std_image": 0.1,
                    "health/std_text": 0.2,
                    "health/gap": 1 / step,
                }
            )
            recalls = {f"eval/{way}_r{k}": step + k for way in ("i2t", "t2i") for k in (1, 5, 10)}
            lines.append({"step": step, **recalls, "eval/images": 10, "eval/captions": 50})
    return [*lines, {"finished": True, "step": 40}]
