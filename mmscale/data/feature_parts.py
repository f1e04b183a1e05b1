"""What a pass through the towers has computed before it was cut short: kept for the next one.

Beside the table that it is going to be, a file for each stretch of batches that one rank has done.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmscale.data.samples import SampleBatch
from mmscale.outputs import publish

_SECONDS = 60.0
_SIDES = ("image", "text")
_LISTS = ("tokens", "cut", "places", "image_ids", "keys", "captions", "damaged")


@dataclass(frozen=True)
class Part:
    """One batch of a set and its tower outputs."""

    batch: SampleBatch
    image: Float[Tensor, "samples f"]
    text: Float[Tensor, "captions g"]


class KeptParts:
    """The parts of one table, by the places of their batches.

    A rank uses those whose batches are its own: those of another world or batch size lie elsewhere.

    Args:
        folder: Of the cache; another rank's parts are used where the folder is shared.
        digest: Names the table.
    """

    def __init__(self, folder: Path, digest: str):
        self._folder, self._digest = folder, digest
        self._new: list[tuple[range, Part]] = []
        self._written = time.monotonic()
        self._there = dict(self._read())

    @property
    def count(self) -> int:
        """Samples that were there at the beginning."""
        return sum(len(range(*place)) for place in self._there)

    def find(self, batches: Sequence[range]) -> dict[int, Part]:
        """What is there of some batches, by their number."""
        places = [(places.start, places.stop) for places in batches]
        return {n: self._there[place] for n, place in enumerate(places) if place in self._there}

    def add(self, places: range, part: Part) -> None:
        """Take a batch that is done."""
        self._new.append((places, part))
        if time.monotonic() - self._written > _SECONDS:
            self._write()

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """The pass: however it is cut short, what was added is kept."""
        try:
            yield
        except BaseException:
            self._write()
            raise

    def remove(self) -> None:
        """The table is there."""
        for path in self._paths():
            with suppress(OSError):
                path.unlink()

    def _paths(self) -> list[Path]:
        return sorted(self._folder.glob(f".{self._digest}-*.safetensors"))

    def _read(self) -> Iterator[tuple[tuple[int, int], Part]]:
        for path in self._paths():
            try:
                with safe_open(path, "pt") as file:
                    notes = json.loads((file.metadata() or {})["parts"])
                    for number, (start, stop, lists) in enumerate(notes):
                        batch = SampleBatch(None, **{name: lists[name] for name in _LISTS})
                        batch.captions = [tuple(captions) for captions in batch.captions]
                        image, text = (file.get_tensor(f"{side}{number}") for side in _SIDES)
                        if len(image) == len(batch.places) and len(text) == len(batch.cut):
                            yield (int(start), int(stop)), Part(batch, image, text)
            except (OSError, SafetensorError, ValueError, LookupError, TypeError):
                # Of no use to anybody; what it held is computed again.
                continue

    def _write(self) -> None:
        """A file of what is new; a disk that has no room for it costs the parts, not the run."""
        if not self._new:
            return
        tensors: dict[str, Tensor] = {}
        notes = []
        for number, (places, part) in enumerate(self._new):
            tensors |= {f"image{number}": part.image, f"text{number}": part.text}
            lists = {name: getattr(part.batch, name) for name in _LISTS}
            notes.append((places.start, places.stop, lists))
        name = f".{self._digest}-{self._new[0][0].start}-{self._new[-1][0].stop}.safetensors"
        aside = self._folder / f"{name}.part"
        with suppress(OSError, SafetensorError):
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file({k: t.contiguous() for k, t in tensors.items()}, aside, _note(notes))
            publish(aside, self._folder / name)
        self._new, self._written = [], time.monotonic()


def _note(notes: list[tuple[int, int, dict[str, list[object]]]]) -> dict[str, str]:
    return {"parts": json.dumps(notes)}
