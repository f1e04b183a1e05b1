"""A set's image embeddings on disk: made once, reused while images and model are the same.

One safetensors file, mapped into memory: unit rows, and for each a line of JSON with its key and
captions, of which only those that are shown are ever read.
"""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmscale.data.decoded_cache import make_room
from mmscale.data.images import ImageSet, image_batches
from mmscale.engine.encode import Encoder
from mmscale.engine.feed import images_on
from mmscale.errors import ConfigError, DataError
from mmscale.evaluation.encoded import add_module
from mmscale.evaluation.trained import Loaded
from mmscale.outputs import file_output, user_cache
from mmscale.parallel.peers import Alone

# What another version of this file, or of an index, would make otherwise.
_VERSION = "1"
_TENSORS = ("image", "places", "names", "edges")


@dataclass(frozen=True)
class ImageIndex:
    """Embedded images, those that could not be decoded left out.

    Attributes:
        image: Unit rows.
        places: Place of each row's image in its set.
        names: A line of JSON for each row, end to end: `{"key": ..., "captions": [...]}`.
        edges: Where each row's line begins in `names`; one more entry ends the last.
        digest: Of the images and the model.
    """

    image: Float[Tensor, "n d"]
    places: Int64[Tensor, " n"]
    names: UInt8[Tensor, " bytes"]
    edges: Int64[Tensor, " edges"]
    digest: str

    def name(self, row: int) -> tuple[str, tuple[str, ...]]:
        """Key and captions of a row's image.

        Raises:
            DataError: They are not what `save` writes.
        """
        begin, end = self.edges[row : row + 2].tolist()
        try:
            line = json.loads(self.names[begin:end].numpy().tobytes())
            return str(line["key"]), tuple(map(str, line["captions"]))
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise DataError(
                f"row {row} of the search index has no key and captions ({error}); remove the "
                "index, it is made anew"
            ) from error

    def save(self, path: Path) -> None:
        """Write the file that `load` reads."""
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        save_file(tensors, path, {"search_index": _VERSION, "digest": self.digest})

    @classmethod
    def load(cls, path: Path) -> "ImageIndex":
        """Map what `save` wrote into memory.

        Raises:
            DataError: Not such a file.
        """
        try:
            with safe_open(path, "pt") as file:
                notes = file.metadata() or {}
                if notes.get("search_index") != _VERSION:
                    raise ValueError("another kind of file, or of another version")
                tensors = {name: file.get_tensor(name) for name in _TENSORS}
                index = cls(**tensors, digest=notes["digest"])
                index._require_whole()
        except Exception as error:
            raise DataError(
                f"{path}: not a search index ({error}); remove the file, or name another"
            ) from error
        return index

    def _require_whole(self) -> None:
        rows, kinds = len(self.edges) - 1, [torch.float32, torch.int64, torch.uint8, torch.int64]
        dims = [getattr(self, name).ndim for name in _TENSORS]
        types = [getattr(self, name).dtype for name in _TENSORS]
        if dims != [2, 1, 1, 1] or types != kinds or not 0 < rows == len(self.image):
            raise ValueError("its tensors do not belong together")
        if len(self.places) != rows or int(self.places.min()) < 0:
            raise ValueError("its rows have no places")


@dataclass(frozen=True)
class IndexPlace:
    """Where an index is kept.

    Attributes:
        path: The file that the user names, or a folder of indices named by their digests.
        is_named: Whether the user names it.
    """

    path: Path
    is_named: bool

    @classmethod
    def beside(cls, model: str) -> "IndexPlace":
        """In the run that a model is of; else in the user's folder for what can be made again."""
        folder = Path(model)
        if (folder / "checkpoints").is_dir():
            return cls(folder / "search", False)
        if folder.parent.name == "checkpoints":
            return cls(folder.parents[1] / "search", False)
        return cls(user_cache("search"), False)

    def file(self, digest: str) -> Path:
        """The file of an index."""
        return self.path if self.is_named else self.path / f"{digest[:32]}.safetensors"


def index_of(
    loaded: Loaded,
    images: ImageSet,
    place: IndexPlace,
    tell: Callable[[str], None],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ImageIndex:
    """The embeddings of a set by a model: those that are kept, or made anew and kept.

    Args:
        loaded: The model.
        images: The set.
        place: Where they are kept.
        tell: Takes a line where they are made, and about images that are left out.
        progress: Called as images are encoded, with how many and of how many.

    Raises:
        DataError: The file is there and no index, or no image can be decoded.
        ConfigError: A named file cannot be written.
    """
    digest = _digest(loaded, images)
    path = place.file(digest)
    found = ImageIndex.load(path) if path.exists() else None
    if found is not None and found.digest == digest:
        if int(found.places.max()) >= images.count:
            raise DataError(f"{path}: names images that the set does not have; remove the file")
        with suppress(OSError):
            os.utime(path)
        return found
    because = "is of another model or other images" if found else "is not there yet"
    tell(f"search: {path} {because}; {images.count:,} images are encoded")
    index = _made(loaded, images, digest, tell, progress)
    _keep(index, place, loaded.config.data.cache_gb * 1e9, tell)
    return index


def _digest(loaded: Loaded, images: ImageSet) -> str:
    """What the rows depend on: weights, feeding, precision and images."""
    digest, spec = hashlib.sha256(), loaded.spec
    feeding = [spec.image_size, spec.mean, spec.std, spec.interpolation, spec.resize]
    facts = [_VERSION, feeding, str(loaded.inference.dtype), images.digest]
    digest.update(json.dumps(facts).encode())
    add_module(digest, "vision", loaded.model.vision)
    add_module(digest, "head", loaded.model.head["image"])
    return digest.hexdigest()


def _made(
    loaded: Loaded,
    images: ImageSet,
    digest: str,
    tell: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> ImageIndex:
    inference = loaded.inference
    encoder = Encoder.of(loaded.config, inference.call, inference.device, loaded.spec, Alone())
    rows, names, edges, done = torch.empty(0), bytearray(), [0], 0
    places: list[int] = []
    damaged: list[str] = []
    for batch in image_batches(images, encoder.spec, encoder.batch_size, encoder.workers):
        done += len(batch.places) + len(batch.damaged)
        damaged += batch.damaged
        if batch.pixels is not None:
            unit = embedded_images(inference, batch.pixels, encoder.spec)
            if not len(rows):
                # At once, so that a large set is not held twice.
                rows = torch.empty(images.count, unit.shape[1])
            rows[len(places) : len(places) + len(unit)] = unit
            places += batch.places
        for key, captions in batch.names:
            names += json.dumps({"key": key, "captions": captions}).encode()
            edges.append(len(names))
        progress(done, images.count)
    _tell_damaged(damaged, len(places), tell)
    rows = rows[: len(places)]
    if not bool(rows.isfinite().all()):
        raise DataError(
            "image embeddings hold NaN or infinity, so nothing can be found among them; use an "
            "earlier checkpoint, or engine.precision=fp32"
        )
    lines = torch.frombuffer(names, dtype=torch.uint8)
    return ImageIndex(rows, torch.tensor(places), lines, torch.tensor(edges), digest)


def _tell_damaged(damaged: list[str], good: int, tell: Callable[[str], None]) -> None:
    if not damaged:
        return
    if not good:
        raise DataError(f"no image can be decoded; the first: {damaged[0]}")
    tell(
        f"search: images that cannot be decoded and are left out: {len(damaged):,}; the first: "
        f"{damaged[0]}"
    )


def embedded_images(inference: Any, pixels: Tensor, spec: Any) -> Float[Tensor, "b d"]:
    """Unit rows of pixels as they are decoded, on the CPU."""
    features = inference.call("image", images_on(pixels, inference.device, spec))
    unit: Tensor = inference.call("head", "image", features.float()).unit
    return unit.float().cpu()


def _keep(index: ImageIndex, place: IndexPlace, limit: float, tell: Callable[[str], None]) -> None:
    """Write the index; where nobody names its place, one that cannot be written is only told."""
    path = place.file(index.digest)
    if place.is_named:
        with file_output("--index", path) as aside:
            index.save(aside)
        return
    try:
        with file_output("", path) as aside:
            index.save(aside)
    except ConfigError as error:
        tell(f"search: the embeddings are not kept ({error}); name a file with --index")
        return
    make_room(place.path, "*.safetensors", limit, 0, lambda other, used: other != path)
