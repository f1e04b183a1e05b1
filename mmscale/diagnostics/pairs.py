"""Embedded image-caption pairs: what every diagnosis and every retrieval figure reads.

In memory they come from the trainer or the evaluation; on disk they are an npz of plain arrays.
"""

import logging
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from mmscale.errors import DataError

# Rows rounded to bf16 or fp16 are off by less than this; more means that nobody normalised them.
UNIT_TOLERANCE = 1e-2

_LOG = logging.getLogger(__name__)

_HOW = 'write numpy arrays: np.savez("pairs.npz", image=image.numpy(), text=text.numpy())'
_MOST_NAMED = 10

# Images with two captions, below which their resemblance says nothing.
FEWEST_TWICE = 96


@dataclass(frozen=True)
class Sources:
    """Where rows come from in their set, for those who want to look at them.

    Attributes:
        places: Place of each image row in the set.
        keys: Key of each image row.
        captions: Text of each caption row.
    """

    places: Int64[Tensor, " n"]
    keys: list[str]
    captions: list[str]


@dataclass(frozen=True)
class Pairs:
    """Unit rows of both modalities; an image and a caption belong together if their ids are equal.

    Attributes:
        image: Image embeddings.
        text: Caption embeddings.
        image_ids: Identity of each image row.
        text_ids: The image id that each caption row belongs to.
        backbone_image: Image tower outputs before the head, for the rows of `image`.
        backbone_text: Text tower outputs before the head, for the rows of `text`.
        logit_scale: 1/temperature at the time.
        sources: What the rows are of; not kept in files.
    """

    image: Float[Tensor, "n d"]
    text: Float[Tensor, "m d"]
    image_ids: Int64[Tensor, " n"]
    text_ids: Int64[Tensor, " m"]
    backbone_image: Float[Tensor, "n f"] | None = None
    backbone_text: Float[Tensor, "m g"] | None = None
    logit_scale: float | None = None
    sources: Sources | None = None

    def cut(self, width: int) -> "Pairs":
        """The first dimensions of the embeddings, made unit rows again."""
        image, text = (F.normalize(rows[:, :width], dim=1) for rows in (self.image, self.text))
        return replace(self, image=image, text=text)


def one_to_one(pairs: Pairs, limit: int | None = None, in_turn: bool = False) -> Pairs:
    """Each distinct image with its first caption, row i with row i, ids distinct; on the CPU.

    The rows of `first_pairs`; `in_turn` gives one image its first caption, the next its second and
    so on, so that the sample says of all captions what it says.
    """
    images, texts = first_pairs(pairs, limit, in_turn)
    backbone = pairs.backbone_image, pairs.backbone_text
    return replace(
        pairs,
        image=_take(pairs.image, images),
        text=_take(pairs.text, texts),
        image_ids=_take(pairs.image_ids, images),
        text_ids=_take(pairs.text_ids, texts),
        backbone_image=None if backbone[0] is None else _take(backbone[0], images),
        backbone_text=None if backbone[1] is None else _take(backbone[1], texts),
        sources=None,
    )


def first_pairs(
    pairs: Pairs, limit: int | None = None, in_turn: bool = False
) -> tuple[Int64[Tensor, " p"], Int64[Tensor, " p"]]:
    """Row of each distinct image and row of its first caption, in the order of the images.

    With `in_turn` it is another of its captions from image to image. Images without a caption and
    captions without an image are left out. More than `limit` images are thinned evenly over their
    order, so the same pairs give the same choice.
    """
    image_ids, text_ids = (ids.cpu().numpy() for ids in (pairs.image_ids, pairs.text_ids))
    _, image_rows, text_rows = np.intersect1d(image_ids, text_ids, return_indices=True)
    order = _evenly(np.argsort(image_rows), limit)
    images, texts = image_rows[order], text_rows[order]
    if in_turn:
        by_id = np.argsort(text_ids, kind="stable")
        begin, end = (
            np.searchsorted(text_ids[by_id], image_ids[images], side) for side in ("left", "right")
        )
        texts = by_id[begin + np.arange(len(images)) % (end - begin)]
    return torch.from_numpy(images), torch.from_numpy(texts)


def _evenly(rows: np.ndarray, limit: int | None) -> np.ndarray:
    """At most `limit` of the rows, evenly over their order."""
    if limit is None or len(rows) <= limit:
        return rows
    return rows[np.linspace(0, len(rows) - 1, limit).round().astype(np.int64)]


def second_captions(
    pairs: Pairs, limit: int
) -> tuple[Float[Tensor, "p g"], Float[Tensor, "p g"]] | None:
    """Text features of two captions of one image, of at most `limit` images, evenly; on the CPU.

    None without such features, and where fewer than a few images have two captions.
    """
    if pairs.backbone_text is None:
        return None
    ids = pairs.text_ids.cpu().numpy()
    order = np.argsort(ids, kind="stable")
    _, starts, counts = np.unique(ids[order], return_index=True, return_counts=True)
    starts = _evenly(starts[counts > 1], limit)
    if len(starts) < FEWEST_TWICE:
        return None
    first, second = (torch.from_numpy(order[starts + place]) for place in (0, 1))
    return _take(pairs.backbone_text, first), _take(pairs.backbone_text, second)


def thinned_rows(pairs: Pairs, limit: int) -> tuple[Int64[Tensor, " p"], Int64[Tensor, " q"]]:
    """Rows of at most `limit` distinct images, evenly, and rows of all of their captions."""
    images = distinct_rows(pairs.image_ids).cpu()
    if len(images) > limit:
        images = images[torch.linspace(0, len(images) - 1, limit).round().long()]
    ids = pairs.image_ids.cpu()[images]
    return images, torch.isin(pairs.text_ids.cpu(), ids).nonzero()[:, 0]


def distinct_rows(ids: Int64[Tensor, " n"]) -> Int64[Tensor, " distinct"]:
    """The first row of each id, in row order."""
    _, rows = np.unique(ids.cpu().numpy(), return_index=True)
    return torch.from_numpy(np.sort(rows)).to(ids.device)


def require_finite(pairs: Pairs) -> None:
    """Refuse NaN and infinity, which every comparison would silently lose or win.

    Raises:
        DataError: An embedding is not finite.
    """
    for side, rows in (("image", pairs.image), ("text", pairs.text)):
        bad = int((~rows.isfinite()).any(dim=1).sum())
        if bad:
            raise DataError(
                f"{bad} of {len(rows)} {side} embeddings hold NaN or infinity, so nothing can be "
                "measured on them; use an earlier checkpoint, or embed with engine.precision=fp32"
            )


def save_npz(path: Path, pairs: Pairs) -> None:
    """Write what `load_npz` reads."""
    given = {name: value for name, value in vars(pairs).items() if name != "sources"}
    arrays = {name: value for name, value in given.items() if value is not None}
    plain = {
        name: value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        for name, value in arrays.items()
    }
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **plain)


def load_npz(path: Path) -> Pairs:
    """Read `image` and `text` rows with their ids and what else is known of them.

    Without ids row i belongs to row i; one array of ids serves both sides. Ids are integers or
    texts, such as names of files. Rows are divided by their norms, with a warning where they were
    not unit rows; where all are zeros they stay (a dead tower gives them).

    Raises:
        DataError: The file is not such an npz, or its arrays do not fit together, or some rows are
            not finite or zeros.
    """
    return pairs_of(str(path), _read(path))


def pairs_of(path: str, arrays: Mapping[str, np.ndarray]) -> Pairs:
    """Pairs of plain arrays, as `load_npz` reads them.

    Args:
        path: What messages call the arrays' place.
        arrays: By the names of an npz.

    Raises:
        DataError: They do not fit together, or some rows are not finite or zeros.
    """
    for name in ("image", "text"):
        if name not in arrays:
            raise DataError(
                f"{path} has no array `{name}`; it needs `image` [n d] and `text` [m d]"
            )
    image, text = _rows(path, arrays, "image"), _rows(path, arrays, "text")
    if image.shape[1] != text.shape[1]:
        raise DataError(
            f"{path}: image rows are {image.shape[1]} wide and text rows {text.shape[1]}; "
            "both must lie in the shared space"
        )
    image_ids, text_ids = _ids(path, arrays, len(image), len(text))
    if not np.intersect1d(image_ids, text_ids).size:
        raise DataError(
            f"{path}: no text_ids entry occurs among image_ids, so no row has a partner"
        )
    return Pairs(
        image=_unit(path, image, "image"),
        text=_unit(path, text, "text"),
        image_ids=torch.from_numpy(image_ids),
        text_ids=torch.from_numpy(text_ids),
        backbone_image=_backbone(path, arrays, "image", len(image)),
        backbone_text=_backbone(path, arrays, "text", len(text)),
        logit_scale=_logit_scale(path, arrays),
    )


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file:
            content = np.load(file, allow_pickle=False)
            if isinstance(content, np.ndarray):
                raise DataError(
                    f"{path} is a single array; an npz with `image` and `text` is needed"
                )
            # A torch file is a zip too, of a pickle and raw storages.
            if any(name.endswith("data.pkl") for name in content.files):
                raise DataError(f"{path} is a torch file; {_HOW}")
            return {name: content[name] for name in content.files}
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        # numpy's own message recommends unpickling, which we never do.
        if "allow_pickle" in str(error):
            raise DataError(
                f"{path} is not an npz of plain arrays, but holds pickled objects, as lists of "
                f"mixed kinds and old torch files do; {_HOW}, ids as np.array(ids, dtype=str)"
            ) from error
        raise DataError(f"{path} is not an npz of plain arrays: {error}") from error


def _rows(path: str, arrays: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    rows = arrays[name]
    if rows.ndim != 2 or not rows.size or rows.dtype.kind != "f":
        raise DataError(
            f"{path}: `{name}` is {rows.dtype} of shape {rows.shape}; "
            "it must be a matrix of floats with at least one row"
        )
    if not np.isfinite(rows).all():
        bad = ~np.isfinite(rows).all(axis=1)
        raise DataError(
            f"{path}: {bad.sum()} of {len(rows)} rows of `{name}` hold NaN or infinity, "
            f"the first is row {bad.argmax()}; embed again in fp32"
        )
    return rows


def _unit(path: str, rows: np.ndarray, name: str) -> Float[Tensor, "n d"]:
    wide = rows.astype(np.float64)
    # Scaled first, so that squares of large or tiny entries stay finite and nonzero.
    wide /= np.where((peaks := np.abs(wide).max(axis=1, keepdims=True)) > 0, peaks, 1.0)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    odd = int((np.abs(norms * peaks - 1) > UNIT_TOLERANCE).sum())
    zeros = int((norms == 0).sum())
    if 0 < zeros < len(rows):
        those = _named(np.flatnonzero(norms[:, 0] == 0), name)
        raise DataError(
            f"{path}: {those} only zeros, which no division "
            "makes a unit row; embed again what stands there, or leave it out on both sides"
        )
    if odd:
        _LOG.warning(
            "%s: %d of %d rows of `%s` are not unit rows (%d are zeros); they are normalised here",
            path,
            odd,
            len(rows),
            name,
            zeros,
        )
    return torch.from_numpy((wide / np.where(norms > 0, norms, 1.0)).astype(np.float32))


def _named(rows: np.ndarray, array: str) -> str:
    """`2 rows (5, 17) of `image` hold`, not more of them than one can read."""
    more = ", ..." * (len(rows) > _MOST_NAMED)
    several = len(rows) > 1
    return (
        f"{len(rows)} row{'s' * several} ({', '.join(map(str, rows[:_MOST_NAMED]))}{more}) of "
        f"`{array}` hold{'s' * (not several)}"
    )


def _ids(
    path: str, arrays: Mapping[str, np.ndarray], images: int, texts: int
) -> tuple[np.ndarray, np.ndarray]:
    names = ("image_ids", "text_ids")
    given: dict[str, np.ndarray] = {name: arrays[name] for name in names if name in arrays}
    for name, ids in given.items():
        rows = images if name == "image_ids" else texts
        if ids.shape != (rows,) or ids.dtype.kind not in "iuUS":
            raise DataError(
                f"{path}: `{name}` is {ids.dtype} of shape {ids.shape}; "
                f"it must be one integer or text for each of the {rows} rows"
            )
        if ids.dtype.kind in "iu" and (ids.astype(np.uint64) >= 2**63).any():
            raise DataError(f"{path}: `{name}` holds an id outside [0, 2^63)")
    given = _numbered(path, given)
    if len(given) < 2 and images != texts:
        raise DataError(
            f"{path}: {images} image rows and {texts} text rows need both `image_ids` and "
            "`text_ids` to tell which belong together"
        )
    either = next(iter(given.values()), np.arange(images))
    image_ids, text_ids = given.get("image_ids", either), given.get("text_ids", either)
    return image_ids.astype(np.int64), text_ids.astype(np.int64)


def _numbered(path: str, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Texts as the numbers of their places among all of them, in order; integers as they are."""
    are_text = {name: ids.dtype.kind in "US" for name, ids in given.items()}
    if not any(are_text.values()):
        return given
    if not all(are_text.values()):
        raise DataError(
            f"{path}: one of `image_ids` and `text_ids` holds texts, the other integers, so that "
            "no pair is equal; give both the same kind"
        )
    texts = [ids.astype(np.str_) for ids in given.values()]
    _, places = np.unique(np.concatenate(texts), return_inverse=True)
    parts = np.split(places, np.cumsum([len(ids) for ids in texts])[:-1])
    return dict(zip(given, parts, strict=True))


def _backbone(path: str, arrays: Mapping[str, np.ndarray], side: str, rows: int) -> Tensor | None:
    name = f"backbone_{side}"
    if name not in arrays:
        return None
    features = _rows(path, arrays, name)
    if len(features) != rows:
        raise DataError(f"{path}: `{name}` has {len(features)} rows, `{side}` has {rows}")
    return torch.from_numpy(features.astype(np.float32))


def _logit_scale(path: str, arrays: Mapping[str, np.ndarray]) -> float | None:
    value = arrays.get("logit_scale")
    if value is None:
        return None
    if value.size != 1 or value.dtype.kind not in "fiu" or not 0 < value.item() < float("inf"):
        raise DataError(f"{path}: `logit_scale` must be one positive number (1 / temperature)")
    return float(value.item())


def _take(rows: Tensor, index: Tensor) -> Tensor:
    return rows.detach()[index.to(rows.device)].cpu()


# Unit rows on a grid of 2^-24: products are multiples of 2^-48 and every partial sum of a dot
# product is at most 1 in size (Cauchy-Schwarz), so float64 holds each exactly, in any order of
# summation, on any device. A plain fp32 product would differ in its last bit with the chunk it
# was computed in, and a tie would be won or lost by chance.
_GRID = 2.0**24


def on_grid(rows: Float[Tensor, "n d"]) -> Float64[Tensor, "n d"]:
    """Unit rows as float64 whose dot products are exact; moves an entry by at most 3e-8."""
    return (rows.detach().double() * _GRID).round() / _GRID


def similarities(
    rows: Float[Tensor, "n d"], columns: Float[Tensor, "m d"]
) -> Float64[Tensor, "n m"]:
    """Cosine of every unit row with every unit column."""
    return on_grid(rows) @ on_grid(columns).T
