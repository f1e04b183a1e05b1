"""The launchers above a rank, and whether they still live.

`deepspeed` and `accelerate launch` end at once when they are told to, and leave their ranks behind.
"""

from pathlib import Path

_PROGRAMS = ("deepspeed", "accelerate", "torchrun")
_MODULES = ("deepspeed.launcher.", "accelerate.commands.", "torch.distributed.")


class Launchers:
    """The chain of launchers from a process upwards, as it is now; empty where /proc is missing."""

    def __init__(self, pid: int):
        self._links: list[tuple[int, int]] = []
        while (parent := _parent(pid)) is not None and _is_launcher(parent):
            self._links.append((pid, parent))
            pid = parent

    @property
    def gone(self) -> bool:
        """One of them has ended, so that nobody waits for the ranks any more."""
        return any(_parent(child) != parent for child, parent in self._links)


def _parent(pid: int) -> int | None:
    try:
        # The program's name stands in brackets and may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[1])


def _is_launcher(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text("utf-8", "replace").split("\0")[:4]
    except OSError:
        return False
    return any(Path(word).name in _PROGRAMS or word.startswith(_MODULES) for word in words)
