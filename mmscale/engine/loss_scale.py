"""Keeps the small gradients of fp16 above its smallest number, by a factor that finds its own size.

Source: Micikevicius et al. 2018, "Mixed Precision Training" (arXiv 1710.03740), section 3.2.
"""

FIRST = 2.0**16
# Applied updates after which a larger factor is tried.
PATIENCE = 2000


class LossScale:
    """The factor: halved when a gradient overflowed, doubled after `PATIENCE` that did not."""

    def __init__(self) -> None:
        self.value = FIRST
        self._applied = 0

    def settle(self, applied: bool) -> None:
        """Take the outcome of an update."""
        self._applied = self._applied + 1 if applied else 0
        if not applied:
            self.value /= 2
        elif self._applied == PATIENCE:
            self.value, self._applied = 2 * self.value, 0

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps, as torch's scaler has it: the next engine may use that one."""
        return {
            "scale": self.value,
            "growth_factor": 2.0,
            "backoff_factor": 0.5,
            "growth_interval": PATIENCE,
            "_growth_tracker": self._applied,
        }

    def restore(self, state: dict[str, float]) -> None:
        """Take what `state` gave, or torch's scaler."""
        self.value, self._applied = float(state["scale"]), int(state["_growth_tracker"])
