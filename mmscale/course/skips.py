"""Updates that were skipped because something was not finite."""

from mmscale.checkpoint.files import Progress
from mmscale.contracts import Batch
from mmscale.engine.step import Update
from mmscale.errors import HaltError

# Updates in a row that may be skipped.
MAX_SKIPPED = 5


class Skips:
    """Counts skipped updates in a row; the same on every rank."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def count(self, progress: Progress, done: Update, batch: Batch) -> None:
        """Take an update.

        Raises:
            HaltError: One too many in a row was skipped.
        """
        self._in_a_row = 0 if done.record.applied else self._in_a_row + 1
        if self._in_a_row >= MAX_SKIPPED:
            raise HaltError(
                f"step {progress.step}: the gradient was not finite in {MAX_SKIPPED} updates in a "
                f"row, lastly on {', '.join(batch.keys[:3])}...; lower optim.lr or set "
                "engine.precision=fp32"
            )
