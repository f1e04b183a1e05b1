"""Which images are most like each image: the table that hard batches are built from."""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int32, Int64
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor
from torch.nn import functional as F

from mmscale.errors import DataError

NEIGHBOURS = 32
_CHUNK = 1024


@dataclass(frozen=True)
class Neighbours:
    """The nearest images of each image.

    Attributes:
        image_ids: Identity of each image.
        rows: For each image the rows of those most like it, nearest first; -1 for none.
    """

    image_ids: Int64[np.ndarray, " n"]
    rows: Int32[np.ndarray, "n k"]

    def tensors(self) -> dict[str, Tensor]:
        """As a file or a checkpoint holds it."""
        ids, rows = torch.from_numpy(self.image_ids), torch.from_numpy(self.rows)
        return {"image_ids": ids, "neighbours": rows}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> "Neighbours":
        """From what `tensors` gave."""
        return cls(tensors["image_ids"].numpy(), tensors["neighbours"].numpy())

    def places(self, image_ids: Int64[np.ndarray, " samples"]) -> Int32[np.ndarray, "samples k"]:
        """For samples with these ids the places of their neighbours among them; -1 for none."""
        order = np.argsort(image_ids, kind="stable")
        place = _find(image_ids[order], self.image_ids)
        place[place >= 0] = order[place[place >= 0]]
        # The last entry is what -1 points at.
        place = np.append(place, -1).astype(np.int32)
        by_id = np.argsort(self.image_ids, kind="stable")
        row = _find(self.image_ids[by_id], image_ids)
        known = row >= 0
        places = np.full((len(image_ids), self.rows.shape[1]), -1, np.int32)
        places[known] = place[self.rows[by_id[row[known]]]]
        return places


def nearest(
    features: Float[Tensor, "n f"], image_ids: Int64[Tensor, " n"], count: int = NEIGHBOURS
) -> Neighbours:
    """The table of images by the cosine of their features; rows of one image are no neighbours."""
    unit = F.normalize(features.float(), dim=1)
    count = min(count, len(unit) - 1)
    rows = []
    for start in range(0, len(unit), _CHUNK):
        part = slice(start, start + _CHUNK)
        cosine = unit[part] @ unit.T
        cosine.masked_fill_(image_ids[part, None] == image_ids, -torch.inf)
        best = cosine.topk(count, dim=1)
        rows.append(best.indices.masked_fill(best.values == -torch.inf, -1).int().cpu())
    return Neighbours(image_ids.cpu().numpy(), torch.cat(rows).numpy())


def mean_by_image(
    features: Float[Tensor, "m f"], ids: Int64[Tensor, " m"], image_ids: Int64[Tensor, " n"]
) -> Float[Tensor, "n f"]:
    """Captions' features, each of norm 1, averaged over the captions of each image."""
    owners, place = image_ids.unique(return_inverse=True)
    row = torch.searchsorted(owners, ids).clamp(max=len(owners) - 1)
    mine = owners[row] == ids
    unit = F.normalize(features[mine].float(), dim=1)
    return unit.new_zeros(len(owners), unit.shape[1]).index_add_(0, row[mine], unit)[place]


def read_neighbours(path: Path, by: str) -> Neighbours:
    """A table that was given, or one of the embeddings that `mmscale embed` wrote.

    Args:
        path: npz or safetensors with `image_ids` [n] and `neighbours` [n k] (rows of `image_ids`,
            -1 for none); or with `image_ids`, `image` [n d] and, for captions, `text` [m d] and
            `text_ids` [m].
        by: `image` or `text`: what embeddings are compared.

    Raises:
        DataError: Neither.
    """
    arrays = _read(path)
    if "neighbours" in arrays:
        ids, rows = _array(path, arrays, "image_ids", 1), _array(path, arrays, "neighbours", 2)
        if len(ids) != len(rows) or rows.min(initial=-1) < -1 or rows.max(initial=-1) >= len(ids):
            raise DataError(
                f"{path}: `neighbours` {list(rows.shape)} must have a row for each of the "
                f"{len(ids)} image_ids and hold rows of it, or -1"
            )
        return Neighbours(ids.astype(np.int64), rows.astype(np.int32))
    image_ids = torch.from_numpy(_array(path, arrays, "image_ids", 1).astype(np.int64))
    features = torch.from_numpy(_array(path, arrays, by, 2)).float()
    if by == "text":
        owners = torch.from_numpy(_array(path, arrays, "text_ids", 1).astype(np.int64))
        if len(owners) != len(features):
            raise DataError(f"{path}: {len(features)} rows of `text`, {len(owners)} of `text_ids`")
        features = mean_by_image(features, owners, image_ids)
    finite = bool(torch.isfinite(features).all())
    if len(image_ids) != len(features) or len(image_ids) < 2 or not finite:
        raise DataError(
            f"{path}: needs a finite row of `{by}` for each of its image_ids, two or more"
        )
    return nearest(features, image_ids)


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with np.load(path, allow_pickle=False) as content:
            names = {"image_ids", "neighbours", "image", "text", "text_ids"} & set(content.files)
            return {name: content[name] for name in names}
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile, SafetensorError) as error:
        raise DataError(
            f"data.hard_batches.table={path}: cannot be read ({error}); name an npz of mmscale "
            "embed, or a table of neighbours"
        ) from error


def _array(path: Path, arrays: dict[str, Any], name: str, dimensions: int) -> np.ndarray:
    array = arrays.get(name)
    kind = "iu" if name in ("image_ids", "text_ids", "neighbours") else "f"
    if array is None or array.ndim != dimensions or array.dtype.kind not in kind:
        raise DataError(
            f"data.hard_batches.table={path}: has no array `{name}` of {dimensions} "
            f"dimension{'s' * (dimensions > 1)} and the right type; it needs image_ids and "
            "neighbours, or what mmscale embed writes"
        )
    return array


def _find(ascending: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each wanted value stands in an ascending array; -1 where it does not."""
    place = np.searchsorted(ascending, wanted).clip(max=max(0, len(ascending) - 1))
    return np.where(ascending[place] == wanted, place, -1) if len(ascending) else place - 1
