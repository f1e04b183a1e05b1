"""Checkpoints that somebody edited on purpose: every digest is right."""

import hashlib
import json
from pathlib import Path
from typing import Any

from mmscale.checkpoint.state import DIGEST, STATE


def read_state_of(folder: Path) -> Any:
    """What `state.json` of a checkpoint holds."""
    return json.loads((folder / STATE).read_text("utf-8"))


def seal(folder: Path, state: Any) -> None:
    """Write a checkpoint's `state.json`, JSON or bytes, and the digest that goes with it."""
    content = state if isinstance(state, bytes) else json.dumps(state).encode()
    (folder / STATE).write_bytes(content)
    (folder / DIGEST).write_text(f"{hashlib.sha256(content).hexdigest()}  {STATE}\n", "utf-8")
