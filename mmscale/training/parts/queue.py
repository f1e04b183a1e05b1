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
        self.unique = unique
        # On the device: where an update is skipped there, the place stays, and the host goes on.
        self._next = torch.zeros((), dtype=torch.long, device=device)

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
        applied: Tensor | None = None,
    ) -> None:
        """Keep the rows of a global batch in place of the oldest; a batch may exceed the bank.

        Args:
            image: Unit rows.
            text: Unit rows.
            ids: Match ids.
            applied: A flag on the device: where it is false, the bank stays as it is. Not with a
                slot an image.
        """
        if self.unique:
            assert applied is None, "slots of images are found on the host"
            chosen, slots = self._own_slots(ids)
        else:
            chosen, slots = self._next_slots(len(ids), applied)
        for held, rows in zip(
            (self._rows.image, self._rows.text, self._rows.ids), (image, text, ids), strict=True
        ):
            new = rows[chosen].to(held.dtype)
            held[slots] = new if applied is None else torch.where(applied, new, held[slots])

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        rows, place = self._rows, self._next.reshape(1)
        return {"image": rows.image, "text": rows.text, "ids": rows.ids, "next": place}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what `tensors` gave; a bank of another size keeps the latest rows that fit."""
        before = RowBank(0, 0, self.unique, tensors["ids"].device)
        before._rows = Bank(tensors["image"], tensors["text"], tensors["ids"])
        before._next.copy_(tensors["next"][0])
        if len(before) == len(self):
            for name in ("image", "text", "ids"):
                getattr(self._rows, name).copy_(tensors[name])
            self._next.copy_(before._next)
            return
        rows = before.latest(min(len(self), len(before)))
        full, device = rows.ids.flip(0) != EMPTY, self._rows.ids.device
        self.add(*(held.flip(0)[full].to(device) for held in (rows.image, rows.text, rows.ids)))

    def _next_slots(self, count: int, applied: Tensor | None) -> tuple[Tensor, Tensor]:
        """The last rows of a batch and the slots that they take in turn."""
        kept, size = min(count, len(self)), len(self)
        turn = torch.arange(kept, device=self._next.device)
        slots = (self._next + turn) % size
        step = kept if applied is None else kept * applied.long()
        self._next = (self._next + step) % size
        return count - kept + turn, slots

    def _own_slots(self, ids: Int64[Tensor, " n"]) -> tuple[Tensor, Tensor]:
        """The last row of each id, and the slot of that id or the next one that is not in use."""
        last = {identity: row for row, identity in enumerate(ids.tolist())}
        last = dict(list(last.items())[-len(self) :])
        held = {identity: slot for slot, identity in enumerate(self._rows.ids.tolist())}
        slots = {identity: held[identity] for identity in last if identity in held}
        used, place = set(slots.values()), int(self._next)
        for identity in last:
            if identity in slots:
                continue
            while place in used:
                place = (place + 1) % len(self)
            slots[identity] = place
            used.add(place)
            place = (place + 1) % len(self)
        self._next.fill_(place)
        chosen = torch.tensor(list(last.values()), device=ids.device)
        return chosen, torch.tensor([slots[identity] for identity in last], device=ids.device)


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
        self.follows_on_device = not bank.unique
        self._share, self._of_momentum = share, of_momentum

    def inputs(self, rows: LossInput, features: Features, batch: Batch) -> LossInput:
        length = round(self._share(rows.step) * len(self._bank))
        return replace(rows, bank=self._bank.latest(length)) if length else rows

    def follow(self, rows: LossInput, batch: Batch, applied: Tensor | None = None) -> None:
        image, text = rows.image.unit, rows.text.unit
        if self._of_momentum:
            assert rows.momentum_image is not None, "a queue of momentum rows has its encoder"
            assert rows.momentum_text is not None, "a queue of momentum rows has its encoder"
            image, text = rows.momentum_image, rows.momentum_text
        columns = self._peers.columns
        self._bank.add(columns(image.detach()), columns(text.detach()), columns(rows.ids), applied)

    def tensors(self) -> Iterator[NamedTensor]:
        for name, tensor in self._bank.tensors().items():
            yield NamedTensor(f"{self.name}.{name}", tensor, {})

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._bank.restore(tensors)
