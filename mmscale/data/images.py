"""Images alone, for whoever embeds nothing else of a set: of shards, or a folder's files."""

import hashlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor
from torch.utils.data import Dataset

from mmscale.contracts import InputSpec
from mmscale.data.damage import DamagedSampleError
from mmscale.data.features import loaded
from mmscale.data.manifest import MANIFEST_NAME
from mmscale.data.pixels import EvalTransform, decode, stack_rows
from mmscale.data.reader import SampleReader
from mmscale.data.shard_set import ShardSet
from mmscale.data.shards import open_shards
from mmscale.data.sources.records import PICTURE
from mmscale.errors import DataError


@dataclass(frozen=True)
class StoredImage:
    """An image as it lies in its set.

    Attributes:
        key: Its name there.
        content: The encoded image.
        captions: What is said of it; () where nothing is.
    """

    key: str
    content: bytes
    captions: tuple[str, ...]


@runtime_checkable
class ImageReader(Protocol):
    """Reads images by their place in a set."""

    def read(self, place: int) -> StoredImage:
        """The image at a place.

        Raises:
            DamagedSampleError: What lies there is no sample.
            DataError: It cannot be read at all.
        """

    def close(self) -> None:
        """Free files and connections."""


@runtime_checkable
class ImageSet(Protocol):
    """Images in an order.

    Attributes:
        count: How many there are.
        digest: Changes when any of them, or what is said of it, does.
    """

    @property
    def count(self) -> int: ...

    @property
    def digest(self) -> str: ...

    def reader(self) -> ImageReader:
        """One of this process's own."""


def open_images(setting: str, where: str) -> ImageSet:
    """The images of shards, or of a folder that holds image files and no shards.

    Args:
        setting: Name of the setting or option, for messages.
        where: What `open_shards` takes, or a folder of JPEG, PNG or WebP files, at any depth.

    Raises:
        DataError: Neither.
    """
    folder = Path(where)
    if folder.is_dir() and not (folder / MANIFEST_NAME).exists() and not any(folder.glob("*.tar")):
        files = sorted(path for path in folder.rglob("*") if _is_image(path, folder))
        if files:
            return LooseImages(folder, tuple(files))
    return PackedImages(open_shards(setting, where))


def _is_image(path: Path, within: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(within).parts)
    return not hidden and PICTURE.fullmatch(path.name) is not None and path.is_file()


@dataclass(frozen=True)
class PackedImages:
    """The images of shards, in the order of their manifests."""

    shards: ShardSet

    @property
    def count(self) -> int:
        return self.shards.samples

    @property
    def digest(self) -> str:
        return _sha256(f"{self.shards.digest}/{self.shards.described}")

    def reader(self) -> ImageReader:
        return _PackedReader(self.shards)


class _PackedReader:
    def __init__(self, shards: ShardSet):
        self._shards, self._reader = shards, SampleReader(shards)

    def read(self, place: int) -> StoredImage:
        sample = self._reader.read(*self._shards.sample_at(place))
        return StoredImage(sample.key, sample.image, sample.captions)

    def close(self) -> None:
        self._reader.close()


@dataclass(frozen=True)
class LooseImages:
    """Files below a folder, by their paths in it; nothing is said of them."""

    folder: Path
    files: tuple[Path, ...]

    @property
    def count(self) -> int:
        return len(self.files)

    @property
    def digest(self) -> str:
        """Of names, sizes and times of change: contents are not read for it."""
        facts = ((path, path.stat()) for path in self.files)
        lines = [
            f"{path.relative_to(self.folder)}\0{fact.st_size}\0{fact.st_mtime_ns}"
            for path, fact in facts
        ]
        return _sha256("\n".join(lines))

    def reader(self) -> ImageReader:
        return _LooseReader(self)


@dataclass(frozen=True)
class _LooseReader:
    images: LooseImages

    def read(self, place: int) -> StoredImage:
        path = self.images.files[place]
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        return StoredImage(str(path.relative_to(self.images.folder)), content, ())

    def close(self) -> None:
        pass


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


@dataclass
class ImageBatch:
    """Consecutive images of a set; those that cannot be decoded are named and leave no row.

    Attributes:
        pixels: [m c h w] bytes; None where every image is damaged.
        places: Place of each row's image in the set.
        names: Key and captions of each row's image.
        damaged: One line for each image that could not be decoded.
    """

    pixels: Tensor | None = None
    places: list[int] = field(default_factory=list)
    names: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)


def image_batches(
    images: ImageSet, spec: InputSpec, size: int, workers: int
) -> Iterator[ImageBatch]:
    """All images of a set in order, decoded for evaluation by `workers` processes.

    Raises:
        DataError: An image, or its shard, cannot be read.
    """
    yield from loaded(_Batches(images, spec, size), workers)


class _Batches(Dataset):
    """Batch j holds the images at `j * size` and behind it."""

    def __init__(self, images: ImageSet, spec: InputSpec, size: int):
        self._images, self._size = images, size
        self._transform = EvalTransform(spec)
        self._reader: ImageReader | None = None

    def __len__(self) -> int:
        return -(-self._images.count // self._size)

    def __getitem__(self, index: int) -> ImageBatch:
        # A reader is opened where it is used: workers share no files.
        reader = self._reader = self._reader or self._images.reader()
        batch, pixels = ImageBatch(), []
        start = index * self._size
        for place in range(start, min(start + self._size, self._images.count)):
            try:
                image = reader.read(place)
                pixels.append(self._transform(decode(image.content, image.key)))
            except DamagedSampleError as error:
                batch.damaged.append(str(error))
                continue
            batch.places.append(place)
            batch.names.append((image.key, image.captions))
        if pixels:
            batch.pixels = stack_rows(pixels)
        return batch


def read_at(images: ImageSet, places: list[int]) -> Iterator[StoredImage | None]:
    """The images at some places; None for one that is no sample any more."""
    with closing(images.reader()) as reader:
        for place in places:
            try:
                yield reader.read(place)
            except DamagedSampleError:
                yield None
