"""The queue: rows of earlier batches, kept as further negatives.

Every rank keeps the same rows, because it adds the whole global batch in its order: what a pair is
contrasted with does not depend on how many ranks there are.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mmscale.contracts import Bank, Batch, Features, LossInput, NamedTensor, Peers
from mmscale.training.part import Part

EMPTY = -1


class RowBank:
    """A ring of the latest rows, or one slot an image.

    Not a multiple of the batch, nor shorter than the data set: the ids tell the loss which slots
    are empty and which hold a row's own image.

    Source: He et al. 2020, "Momentum Contrast" (arXiv 1911.05722), section 3.2; the slot an image
        is the memory bank of Wu et al. 2018 (arXiv 1805.01978), section 3.2.
    """

    def __init__(
        self,
        size: int,
        width: int,
        unique: bool,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ):
        """An empty bank.

        Args:
            size: Slots.
            width: Embedding width.
            unique: A row takes the slot of its own id where there is one.
            device: Where the rows lie.
            dtype: Of the rows.
        """
        self._rows = Bank(
            image=torch.zeros(size, width, device=device, dtype=dtype),
            text=torch.zeros(size, width, device=device, dtype=dtype),
            ids=torch.full((size,), EMPTY, device=device),
        )
        self._unique = unique
        self._next = 0

    def __len__(self) -> int:
        return len(self._rows.ids)

    @property
    def filled(self) -> int:
        """Slots that hold a row."""
        return int((self._rows.ids != EMPTY).sum())

    def latest(self, length: int | None = None) -> Bank:
        """The rows, or the `length` slots written last.

        A copy, because a loss needs them unchanged until its backward is through. With a slot an
        image, those whose turn comes last.
        """
        size = len(self)
        count = size if length is None else min(length, size)
        slots = (self._next - 1 - torch.arange(count, device=self._rows.ids.device)) % size
        return Bank(self._rows.image[slots], self._rows.text[slots], self._rows.ids[slots])

    def add(
        self,
        image: Float[Tensor, "n d"],
        text: Float[Tensor, "n d"],
        ids: Int64[Tensor, " n"],
    ) -> None:
        """Keep the rows of a global batch in place of the oldest; a batch may exceed the bank."""
        rows, slots = self._own_slots(ids) if self._unique else self._next_slots(len(ids))
        rows, slots = rows.to(ids.device), slots.to(ids.device)
        self._rows.image[slots] = image[rows].to(self._rows.image.dtype)
        self._rows.text[slots] = text[rows].to(self._rows.text.dtype)
        self._rows.ids[slots] = ids[rows]

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        rows, place = self._rows, torch.tensor([self._next])
        return {"image": rows.image, "text": rows.text, "ids": rows.ids, "next": place}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what `tensors` gave; a bank of another size keeps the latest rows that fit."""
        before = RowBank(0, 0, self._unique, self._rows.ids.device)
        before._rows = Bank(tensors["image"], tensors["text"], tensors["ids"])
        before._next = int(tensors["next"])
        if len(before) == len(self):
            for name in ("image", "text", "ids"):
                getattr(self._rows, name).copy_(tensors[name])
            self._next = before._next
            return
        rows = before.latest(min(len(self), len(before)))
        full = rows.ids.flip(0) != EMPTY
        self.add(rows.image.flip(0)[full], rows.text.flip(0)[full], rows.ids.flip(0)[full])

    def _next_slots(self, count: int) -> tuple[Tensor, Tensor]:
        """The last rows of a batch and the slots that they take in turn."""
        kept = min(count, len(self))
        slots = (self._next + torch.arange(kept)) % len(self)
        self._next = (self._next + kept) % len(self)
        return torch.arange(count - kept, count), slots

    def _own_slots(self, ids: Int64[Tensor, " n"]) -> tuple[Tensor, Tensor]:
        """The last row of each id, and the slot of that id or the next one that is not in use."""
        last = {identity: row for row, identity in enumerate(ids.tolist())}
        last = dict(list(last.items())[-len(self) :])
        held = {identity: slot for slot, identity in enumerate(self._rows.ids.tolist())}
        slots = {identity: held[identity] for identity in last if identity in held}
        used = set(slots.values())
        for identity in last:
            if identity in slots:
                continue
            while self._next in used:
                self._next = (self._next + 1) % len(self)
            slots[identity] = self._next
            used.add(self._next)
            self._next = (self._next + 1) % len(self)
        rows = torch.tensor(list(last.values()))
        return rows, torch.tensor([slots[identity] for identity in last])


class Queue(Part):
    """Gives the objective the bank's rows, and the bank the rows of each global batch.

    The global batch is added in its order, so that every rank keeps the same rows.
    """

    name = "queue"
    has_tensors = True

    def __init__(
        self, bank: RowBank, peers: Peers, share: Callable[[int], float], of_momentum: bool
    ):
        """Wrap a bank.

        Args:
            bank: The rows.
            peers: All ranks.
            share: Share of the slots that the objective looks at, by the updates taken.
            of_momentum: It keeps rows of the momentum encoder.
        """
        self._bank, self._peers = bank, peers
        self._share, self._of_momentum = share, of_momentum

    def inputs(self, rows: LossInput, features: Features, batch: Batch) -> LossInput:
        length = round(self._share(rows.step) * len(self._bank))
        return replace(rows, bank=self._bank.latest(length)) if length else rows

    def follow(self, rows: LossInput, batch: Batch) -> None:
        image, text = rows.image.unit, rows.text.unit
        if self._of_momentum:
            assert rows.momentum_image is not None, "a queue of momentum rows has its encoder"
            assert rows.momentum_text is not None, "a queue of momentum rows has its encoder"
            image, text = rows.momentum_image, rows.momentum_text
        columns = self._peers.columns
        self._bank.add(columns(image.detach()), columns(text.detach()), columns(rows.ids))

    def tensors(self) -> Iterator[NamedTensor]:
        for name, tensor in self._bank.tensors().items():
            yield NamedTensor(f"{self.name}.{name}", tensor, {})

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._bank.restore(tensors)
