"""The nearest rows of each row: exactly in tiles, or nearly, for sets too large for that.

Exact search of n rows of width d costs 2 n^2 d operations: seconds for 50,000 rows, hours for a
million. Above `LARGEST_EXACT` rows are grouped around centres, and each is compared with the rows
of the groups nearest to it. With faiss installed (`pip install 'mmscale[faiss]'`) its inverted file
does the same.

Source: Jegou et al. 2011 ("Product quantization for nearest neighbor search", IEEE PAMI 33, section
    4): the inverted file, here without quantisation of what lies in it.
"""

import math
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

LARGEST_EXACT = 100_000
# Numbers in a tile of similarities: 64 MiB.
_TILE = 2**24
_QUERIES = 1024
# Groups that each row is compared with. Of rows that cluster as features do, the ten nearest are
# then found in more than nine cases of ten.
_PROBED = 16
_ROUNDS = 5
_ROWS_A_CENTRE = 40


def nearest_rows(
    rows: Float[Tensor, "n d"], count: int, exact: bool | None = None
) -> tuple[Int64[Tensor, "n k"], Float[Tensor, "n k"]]:
    """The `count` rows nearest to each row by cosine, itself left out, the nearest first.

    Args:
        rows: Of any length; rows of zeros are far from everything.
        count: Neighbours wanted; at most n - 1 are given.
        exact: Compare every row with every row; by default up to `LARGEST_EXACT` rows.

    Returns:
        Their places, and their cosines. A row without so many neighbours in the groups near it has
        its own place and the cosine -1 for those that lack.
    """
    unit = F.normalize(rows.float(), dim=1)
    count = min(count, len(unit) - 1)
    if exact if exact is not None else len(unit) <= LARGEST_EXACT:
        return _exact(unit, count)
    if find_spec("faiss") is not None:
        return _by_faiss(unit, count)
    return _by_groups(unit, count)


def _exact(
    unit: Float[Tensor, "n d"], count: int
) -> tuple[Int64[Tensor, "n k"], Float[Tensor, "n k"]]:
    places, cosines = [], []
    width = max(count, _TILE // _QUERIES)
    for start in range(0, len(unit), _QUERIES):
        queries = unit[start : start + _QUERIES]
        own = torch.arange(start, start + len(queries))
        best = queries.new_full((len(queries), count), -torch.inf)
        held = own[:, None].expand(-1, count)
        for left in range(0, len(unit), width):
            tile = queries @ unit[left : left + width].T
            inside = (own >= left) & (own < left + tile.shape[1])
            tile[inside, own[inside] - left] = -torch.inf
            best, held = _merged(best, held, tile, torch.arange(left, left + tile.shape[1]))
        places.append(held)
        cosines.append(best)
    return torch.cat(places), torch.cat(cosines)


def _merged(
    best: Float[Tensor, "q k"],
    held: Int64[Tensor, "q k"],
    tile: Float[Tensor, "q c"],
    columns: Int64[Tensor, " c"],
) -> tuple[Float[Tensor, "q k"], Int64[Tensor, "q k"]]:
    """The k greatest of those held and of a further tile."""
    count = best.shape[1]
    new = tile.topk(min(count, tile.shape[1]), dim=1)
    values = torch.cat([best, new.values], dim=1)
    places = torch.cat([held, columns[new.indices]], dim=1)
    order = values.topk(count, dim=1)
    return order.values, places.gather(1, order.indices)


def _by_groups(
    unit: Float[Tensor, "n d"], count: int
) -> tuple[Int64[Tensor, "n k"], Float[Tensor, "n k"]]:
    centres = _centres(unit)
    probed = min(_PROBED, len(centres))
    near = torch.cat(
        [(part @ centres.T).topk(probed, dim=1).indices for part in unit.split(_QUERIES)]
    )
    members = _lists(near[:, 0], len(centres))
    askers = _lists(near.flatten(), len(centres))
    best = unit.new_full((len(unit), count), -torch.inf)
    held = torch.arange(len(unit))[:, None].repeat(1, count)
    for group, asking in zip(members, askers, strict=True):
        # A group that is large beyond measure, of copies say, is searched in parts.
        for columns in group.split(_TILE // _QUERIES):
            there = unit[columns]
            for queries in (asking // probed).split(_QUERIES):
                tile = unit[queries] @ there.T
                tile[queries[:, None] == columns[None, :]] = -torch.inf
                best[queries], held[queries] = _merged(best[queries], held[queries], tile, columns)
    return held, best.clamp(min=-1.0)


def _lists(groups: Int64[Tensor, " n"], count: int) -> tuple[Int64[Tensor, " members"], ...]:
    """For each group the places at which it stands."""
    return groups.argsort(stable=True).split(groups.bincount(minlength=count).tolist())


def _centres(unit: Float[Tensor, "n d"]) -> Float[Tensor, "c d"]:
    """Spherical k-means on a sample; the same for the same rows."""
    draws = torch.Generator().manual_seed(0)
    count = max(1, min(4096, round(math.sqrt(len(unit)))))
    sample = unit[torch.randperm(len(unit), generator=draws)[: count * _ROWS_A_CENTRE]]
    centres = sample[:count].clone()
    for _ in range(_ROUNDS):
        group = torch.cat([(part @ centres.T).argmax(dim=1) for part in sample.split(_QUERIES)])
        sums = torch.zeros_like(centres).index_add_(0, group, sample)
        centres = torch.where(sums.norm(dim=1, keepdim=True) > 0, F.normalize(sums), centres)
    return centres


def _by_faiss(
    unit: Float[Tensor, "n d"], count: int
) -> tuple[Int64[Tensor, "n k"], Float[Tensor, "n k"]]:
    faiss = import_module("faiss")
    table = unit.contiguous().numpy()
    index = faiss.index_factory(
        unit.shape[1], f"IVF{len(_centres(unit))},Flat", faiss.METRIC_INNER_PRODUCT
    )
    index.train(
        table[torch.randperm(len(unit), generator=torch.Generator().manual_seed(0))[: 2**18]]
    )
    index.add(table)
    index.nprobe = _PROBED
    cosines, places = map(torch.from_numpy, index.search(table, count + 1))
    own = torch.arange(len(unit))[:, None]
    # Of copies, a row may be missing from its own list: then the last one goes.
    drop = torch.where((places == own).any(1), (places == own).int().argmax(1), count)
    kept = torch.arange(count + 1)[None, :] != drop[:, None]
    places, cosines = places[kept].view(-1, count), cosines[kept].view(-1, count)
    lacking = places < 0
    return torch.where(lacking, own, places), cosines.masked_fill(lacking, -1.0)
