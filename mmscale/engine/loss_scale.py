"""Loss scaling of engines that sum their gradients themselves; accelerate brings its own."""

_FIRST_SCALE = 2.0**16
_PATIENCE = 2000  # applied updates after which a larger factor is tried


class LossScale:
    """A factor that keeps the small gradients of fp16 above its smallest number.

    Halved when a gradient overflowed, doubled after `_PATIENCE` applied updates.

    Source: Micikevicius et al. 2018, "Mixed Precision Training" (arXiv 1710.03740), section 3.2.
    """

    def __init__(self) -> None:
        self.value = _FIRST_SCALE
        self._applied = 0

    def update(self, applied: bool) -> None:
        """Take the outcome of an update."""
        self._applied = self._applied + 1 if applied else 0
        if not applied:
            self.value /= 2
        elif self._applied == _PATIENCE:
            self.value, self._applied = 2 * self.value, 0

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps, as torch's scaler has it: the next engine may use that one."""
        return {
            "scale": self.value,
            "growth_factor": 2.0,
            "backoff_factor": 0.5,
            "growth_interval": _PATIENCE,
            "_growth_tracker": self._applied,
        }

    def restore(self, state: dict[str, float]) -> None:
        """Take what `state` gave, or torch's scaler."""
        self.value, self._applied = float(state["scale"]), int(state["_growth_tracker"])
