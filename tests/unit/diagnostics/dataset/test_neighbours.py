import pytest
import torch
import torch.nn.functional as F

from mmscale.diagnostics.dataset import neighbours
from mmscale.diagnostics.dataset.neighbours import nearest_rows


def clustered(num: int, seed: int) -> torch.Tensor:
    draws = torch.Generator().manual_seed(seed)
    centres = torch.randn(40, 32, generator=draws)
    which = torch.randint(0, 40, (num,), generator=draws)
    return centres[which] + 0.5 * torch.randn(num, 32, generator=draws)


@pytest.mark.parametrize("tile", [2**13, 2**24])
def test_tiles_find_what_all_cosines_at_once_find(tile, monkeypatch):
    monkeypatch.setattr(neighbours, "_TILE", tile)
    monkeypatch.setattr(neighbours, "_QUERIES", 128)
    rows = clustered(1000, 0) * torch.rand(1000, 1)
    unit = F.normalize(rows, dim=1)
    whole = (unit @ unit.T).fill_diagonal_(-torch.inf).topk(7, dim=1)
    places, cosines = nearest_rows(rows, 7)
    assert torch.equal(places, whole.indices)
    torch.testing.assert_close(cosines, whole.values)


@pytest.mark.parametrize("way", ["groups", "faiss"])
def test_groups_find_nearly_all_of_them(way, monkeypatch):
    rows = clustered(8000, 0)
    if way == "faiss":
        pytest.importorskip("faiss")
    else:
        monkeypatch.setattr(neighbours, "find_spec", lambda name: None)
    exact, cosines = nearest_rows(rows, 10)
    places, values = nearest_rows(rows, 10, exact=False)
    same = (places[:, :, None] == exact[:, None, :]).any(dim=2).double().mean()
    assert same >= 0.95
    assert not (places == torch.arange(len(rows))[:, None]).any()
    first = places[:, 0] == exact[:, 0]
    torch.testing.assert_close(values[first, 0], cosines[first, 0])


def test_a_set_of_copies_is_searched(monkeypatch):
    monkeypatch.setattr(neighbours, "find_spec", lambda name: None)
    places, cosines = nearest_rows(torch.ones(3000, 8), 3, exact=False)
    torch.testing.assert_close(cosines, torch.ones(3000, 3))
    assert not (places == torch.arange(3000)[:, None]).any()
