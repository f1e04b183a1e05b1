"""The bank against a list that a person would keep."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from mmscale.training.parts.queue import EMPTY, RowBank

CPU = torch.device("cpu")


def rows(ids):
    """Rows that tell whose they are and when they were added."""
    return torch.tensor([[float(place), float(identity)] for place, identity in ids])


def fill(bank, batches):
    """Add batches of ids; returns the list (place, id) of everything added."""
    added = []
    for batch in batches:
        new = [(len(added) + offset, identity) for offset, identity in enumerate(batch)]
        bank.add(rows(new), rows(new) + 0.5, torch.tensor(batch))
        added += new
    return added


batches = st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=9), max_size=6)


@given(batches, st.integers(1, 11))
def test_the_queue_holds_the_latest_rows_newest_first(batches, size):
    bank = RowBank(size, 2, False, CPU)
    latest = fill(bank, batches)[-size:]
    kept = bank.latest()
    full = kept.ids != EMPTY
    assert kept.image[full].tolist() == rows(latest[::-1]).tolist() if latest else not full.any()
    assert bank.filled == len(latest)
    torch.testing.assert_close(kept.text[full], kept.image[full] + 0.5)
    short = bank.latest(3)
    assert short.image.tolist() == kept.image[:3].tolist()


@given(batches)
def test_one_slot_an_image_holds_its_latest_row(batches):
    bank = RowBank(13, 2, True, CPU)
    newest = {identity: place for place, identity in fill(bank, batches)}
    kept = bank.latest()
    held = {int(i): row for i, row in zip(kept.ids, kept.image.tolist(), strict=True) if i != EMPTY}
    assert held == {identity: [place, identity] for identity, place in newest.items()}


@given(batches, st.integers(1, 6))
def test_one_slot_an_image_never_holds_an_image_twice(batches, size):
    bank = RowBank(size, 2, True, CPU)
    added = fill(bank, batches)
    ids = [int(i) for i in bank.latest().ids if i != EMPTY]
    assert len(ids) == len(set(ids)) == min(size, len({identity for _, identity in added}))
    newest = {identity: place for place, identity in added}
    for identity, row in zip(bank.latest().ids.tolist(), bank.latest().image, strict=True):
        assert identity == EMPTY or row.tolist() == [newest[identity], identity]


@given(batches, st.integers(1, 9), st.integers(1, 9))
def test_a_restored_queue_continues_as_before_at_its_own_or_another_size(batches, size, other):
    bank = RowBank(size, 2, False, CPU)
    added = fill(bank, batches)
    same, resized = RowBank(size, 2, False, CPU), RowBank(other, 2, False, CPU)
    same.restore(bank.tensors())
    resized.restore(bank.tensors())
    for tensor, again in zip(bank.tensors().values(), same.tensors().values(), strict=True):
        assert torch.equal(tensor, again)
    wanted = added[-min(size, other) :][::-1]
    kept = resized.latest()
    assert kept.image[kept.ids != EMPTY].tolist() == (rows(wanted).tolist() if wanted else [])
