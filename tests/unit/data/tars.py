"""Shards of noise: what they hold is never decoded."""

import io
import random
import tarfile
from pathlib import Path

from mmscale.data.index import index


def write_shards(folder: Path, sizes: list[int], image_bytes: int, manifest: bool = True) -> Path:
    """Tars `train-NNNNNN.tar` of `sizes` samples each."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = random.Random(0)
    for number, size in enumerate(sizes):
        with tarfile.open(folder / f"train-{number:06d}.tar", "w") as tar:
            for sample in range(size):
                key = f"{number:02d}{sample:04d}"
                add(
                    tar,
                    f"{key}.jpg",
                    noise.randbytes(image_bytes // 2 + noise.randrange(image_bytes)),
                )
                add(tar, f"{key}.txt", f"caption of {key}".encode())
    if manifest:
        index(sorted(folder.glob("*.tar")))
    return folder


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
