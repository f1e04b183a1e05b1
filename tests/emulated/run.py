"""One run, on the emulated card, the CPU, or a card that is there.

`python -m tests.emulated.run card|cpu|cuda REPORT WORDS...`

Writes what made the host wait, by update, as JSON, and ends with the run's exit code. In the
environment, SPOILT_UPDATES has the updates whose pixels are not finite, STOPPED_UPDATE the one at
which SIGTERM comes, and NO_WAITS makes a real card raise where the host would wait.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.emulated import card

SPOILT, STOPPED, STRICT = "SPOILT_UPDATES", "STOPPED_UPDATE", "NO_WAITS"
# Updates after which a card has compiled and allocated what it needs.
WARM = 3


def _counting(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Waits within a launch are its update's; the others lie after it."""

    def counted(learner: Any, batch: Any, step: Any, parts: Any = ()) -> Any:
        number = step.state.step + 1
        if os.environ.get(STOPPED) == str(number):
            os.kill(os.getpid(), signal.SIGTERM)
        if str(number) in os.environ.get(SPOILT, "").split():
            batch = replace(batch, image=batch.image * float("nan"))
        card.waits.phase = f"update {number}"
        try:
            return launch(learner, batch, step, parts)
        finally:
            card.waits.phase = f"after {number}"

    return counted


def _refusing_waits(launch: Callable[..., Any]) -> Callable[..., Any]:
    """CUDA itself raises where the host would wait within an update, once all is warm."""
    import torch

    def refusing(learner: Any, batch: Any, step: Any, parts: Any = ()) -> Any:
        strict = os.environ.get(STRICT) and step.state.step >= WARM and not step.waits
        torch.cuda.set_sync_debug_mode("error" if strict else "default")
        try:
            return launch(learner, batch, step, parts)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return refusing


def main(where: str, report: str, words: list[str]) -> int:
    """The run's exit code."""
    if where == "card":
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cuda:0"
        card.install()
    # Imported when torch has the card.
    from mmscale import train
    from mmscale.parallel import device
    from mmscale.training import step

    if where == "card":
        gpu = device.Gpu("Emulated", (8, 0), True)
        device.this_machine = lambda: device.Machine((gpu,))
    step.launch = _refusing_waits(step.launch) if where == "cuda" else _counting(step.launch)
    code = train.main(words)
    rows = [[*what, count] for what, count in card.waits.found.items()]
    Path(report).write_text(json.dumps(rows, indent=0), "utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
