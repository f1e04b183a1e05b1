"""Batches onto the device. Bytes travel; numbers are made there.

Where the host runs ahead of the device, a thread takes the batches from the stream, copies them
into pinned memory and sends them on a stream of their own, while the updates before them run: what
the loop waits for is a batch that is not decoded yet.
"""

import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass, fields, replace
from queue import Full, Queue
from typing import Any

import torch
from torch import Tensor

from mmscale.contracts import Batch, InputSpec, Position
from mmscale.data.pixels import normalise
from mmscale.parallel.device import DevicePolicy, send

# Batches that are on the device before they are asked for; one more is on its way there.
AHEAD = 2
# Before the name of a teacher, where what is its own stands among a batch's tensors.
_TOKENS, _IMAGES, _TEXTS = "teacher_tokens/", "teacher_images/", "teacher_texts/"
# A thread that waits looks this often whether it is to end, in seconds.
_LOOK = 0.2


def feed(
    batches: Iterator[tuple[Batch, Position]], policy: DevicePolicy, spec: InputSpec
) -> Generator[tuple[Batch, Position], None, None]:
    """The stream's batches on the device, in their order; to be closed.

    Args:
        batches: On the CPU, each with the position after it.
        policy: Says where, and whether the host runs ahead of it.
        spec: How bytes become numbers.

    Raises:
        Exception: What taking from `batches` raised, once all before it is handed out.
    """
    if not policy.runs_ahead:
        for batch, position in batches:
            yield on_device(batch, policy.device, spec), position
        return
    ring = Ring(batches, policy.device)
    try:
        while True:
            sent = ring.take()
            yield replace(sent.batch, image=_numbers(sent.batch.image, spec)), sent.position
    finally:
        ring.close()


@dataclass(frozen=True)
class Sent:
    """A batch on the device.

    Attributes:
        batch: Its pixels are still bytes.
        position: Of the data after it.
        arrived: An event of the stream that it was sent on.
    """

    batch: Batch
    position: Position
    arrived: Any


class Ring:
    """Pinned memory for a few batches, and the thread that fills and sends them."""

    def __init__(self, batches: Iterator[tuple[Batch, Position]], device: torch.device):
        """Start to take batches.

        Args:
            batches: Taken by the thread alone, and closed by it.
            device: Where they go.
        """
        self._batches, self._device = batches, device
        self._stream = torch.Stream(device=device)
        self._ready: Queue[Sent | BaseException] = Queue(AHEAD)
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)
        self._thread.start()

    def take(self) -> Sent:
        """The next batch; work on it that is queued from now on waits until it is there."""
        found = self._ready.get()
        if isinstance(found, BaseException):
            raise found
        here = torch.accelerator.current_stream(self._device)
        here.wait_event(found.arrived)
        for tensor in _tensors(found.batch).values():
            # Its memory is not given away before the work of this stream is through with it.
            tensor.record_stream(here)
        return found

    def close(self) -> None:
        """End the thread, and with it the stream of batches."""
        self._is_closed.set()
        self._thread.join()

    def _run(self) -> None:
        slots = [_Slot(self._device, self._stream) for _ in range(AHEAD + 1)]
        try:
            for turn, (batch, position) in enumerate(self._batches):
                slot = slots[turn % len(slots)]
                if not self._hand_over(Sent(slot.sent(batch), position, slot.arrived)):
                    break
        except BaseException as error:  # noqa: BLE001  it is raised where batches are asked for
            self._hand_over(error)
        finally:
            close = getattr(self._batches, "close", None)
            if close is not None:
                close()

    def _hand_over(self, value: Sent | BaseException) -> bool:
        """Whether it was taken before the ring was closed."""
        while not self._is_closed.is_set():
            try:
                self._ready.put(value, timeout=_LOOK)
            except Full:
                continue
            return True
        return False


class _Slot:
    """Pinned memory for one batch, used again and again."""

    def __init__(self, device: torch.device, stream: Any):
        self._device, self._stream = device, stream
        self._memory: dict[str, Tensor] = {}
        self.arrived: Any = None

    def sent(self, batch: Batch) -> Batch:
        """The batch on the device once `arrived` has come; the memory is then free again."""
        if self.arrived is not None:
            self.arrived.synchronize()
        moved: dict[str, Any] = {}
        with self._stream:
            for name, tensor in _tensors(batch).items():
                # Of the same layout: pixels lie channels last.
                like = torch.empty_like(tensor, device="meta")
                pinned = self._pinned(name, like).copy_(tensor)
                target = torch.empty_like(like, device=self._device)
                moved[name] = target.copy_(pinned, non_blocking=True)
            self.arrived = torch.Event(device=self._device)
            self.arrived.record(self._stream)
        return _holding(batch, moved)

    def _pinned(self, name: str, like: Tensor) -> Tensor:
        size = like.numel() * like.element_size()
        memory = self._memory.get(name)
        if memory is None or len(memory) < size:
            memory = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            self._memory[name] = memory
        return memory[:size].view(like.dtype).as_strided(like.size(), like.stride())


def _tensors(batch: Batch) -> dict[str, Tensor]:
    named = {field.name: getattr(batch, field.name) for field in fields(batch)}
    own = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    tokens = {_TOKENS + name: value for name, value in batch.teacher_tokens.items()}
    images = {_IMAGES + name: image for name, (image, _) in batch.teacher_features.items()}
    texts = {_TEXTS + name: text for name, (_, text) in batch.teacher_features.items()}
    return own | tokens | images | texts


def _holding(batch: Batch, tensors: dict[str, Any]) -> Batch:
    """The batch with these in the place of what `_tensors` gave."""
    of_teachers = (_TOKENS, _IMAGES, _TEXTS)
    own = {name: value for name, value in tensors.items() if not name.startswith(of_teachers)}
    tokens = {name: tensors[_TOKENS + name] for name in batch.teacher_tokens}
    features = {n: (tensors[_IMAGES + n], tensors[_TEXTS + n]) for n in batch.teacher_features}
    return replace(batch, **own, teacher_tokens=tokens, teacher_features=features)


def on_device(batch: Batch, device: torch.device, spec: InputSpec) -> Batch:
    """The rows on `device`, their pixels normalised."""
    moved: dict[str, Any] = {name: send(rows, device) for name, rows in _tensors(batch).items()}
    return _holding(batch, moved | {"image": _numbers(moved["image"], spec)})


def images_on(images: Tensor, device: torch.device, spec: InputSpec) -> Tensor:
    """Pixels as towers take them; cached features as they are."""
    return _numbers(send(images, device), spec)


def _numbers(rows: Tensor, spec: InputSpec) -> Tensor:
    return normalise(rows, spec) if rows.dtype == torch.uint8 else rows
