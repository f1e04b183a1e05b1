"""One side of the data benchmark in a fresh process: prints the seconds its samples took.

python -m tools.bench.data_sides ours|peer|limit FOLDER WORKERS BATCH WARM COUNT
"""

import sys
import tarfile
import time
from argparse import Namespace
from collections.abc import Iterator
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, decode_jpeg

SIZE = 224
CROP_SCALE = (0.9, 1.0)


def main(words: list[str]) -> None:
    """Run one side and print the seconds of `COUNT` batches after `WARM` others."""
    loop = {"ours": ours, "peer": peer, "limit": limit}[words[0]]
    workers, batch, warm, count = map(int, words[2:])
    sys.stdout.write(f"{loop(Path(words[1]), workers, batch, warm, count)}\n")


def ours(folder: Path, workers: int, batch: int, warm: int, count: int) -> float:
    """The training stream: tokenised rows with uint8 pixels, as they go to the device."""
    from mmscale.config.load import load_config
    from mmscale.contracts import InputSpec, Position, World
    from mmscale.data.schedule import plan_schedule
    from mmscale.data.shards import open_shards
    from mmscale.data.stream import TrainStream
    from mmscale.engine.plan import plan_batch
    from mmscale.model.openclip_towers import read_tokenize

    config = load_config(
        [
            "demo",
            f"data.train={folder}",
            f"data.workers={workers}",
            f"data.image_size={SIZE}",
            "data.augment=crop",
            f"data.crop_scale=[{CROP_SCALE[0]},{CROP_SCALE[1]}]",
            f"train.global_batch_size={batch}",
        ]
    )
    tokenize, pad_token = read_tokenize("ViT-B-32", 77, {})
    spec = InputSpec(SIZE, (0.5,) * 3, (0.5,) * 3, "bicubic", tokenize, pad_token, 77)
    shards = open_shards("data.train", config.data.train)
    schedule = plan_schedule(config, shards, plan_batch(config, 1).lanes)
    stream = TrainStream(config, shards, schedule, spec, World()).batches(Position())
    return _timed(stream, warm, count)


def peer(folder: Path, workers: int, batch: int, warm: int, count: int) -> float:
    """open_clip's own training pipeline, as its trainer builds it."""
    import open_clip
    from open_clip_train.data import get_wds_dataset

    tars = sorted(map(str, folder.glob("*.tar")))
    settings = Namespace(
        train_data="::".join(tars),
        train_num_samples=batch * workers * (warm + count),
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        batch_size=batch,
        workers=workers,
        world_size=1,
        seed=0,
    )
    transform = open_clip.image_transform(
        SIZE, is_train=True, aug_cfg=open_clip.AugmentationCfg(scale=CROP_SCALE)
    )
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    data = get_wds_dataset(settings, transform, is_train=True, tokenizer=tokenizer)
    return _timed(iter(data.dataloader), warm, count)


def limit(folder: Path, workers: int, batch: int, warm: int, count: int) -> float:
    """Reading the tar, decoding with libjpeg-turbo, one antialiased uint8 resize: nothing else."""
    context = get_context("fork")
    ready = context.Barrier(workers + 1)
    share = batch * count // workers
    processes = [
        context.Process(target=_bare, args=(folder, worker, workers, batch * warm, share, ready))
        for worker in range(workers)
    ]
    for process in processes:
        process.start()
    ready.wait()
    start = time.perf_counter()
    for process in processes:
        process.join()
    return time.perf_counter() - start


def _bare(folder: Path, worker: int, workers: int, warm: int, count: int, ready: Any) -> None:
    torch.set_num_threads(1)
    images = _bare_images(sorted(folder.glob("*.tar"))[worker::workers])
    for _ in islice(images, warm):
        pass
    ready.wait()
    for _ in islice(images, count):
        pass


def _bare_images(tars: list[Path]) -> Iterator[torch.Tensor]:
    for path in cycle(tars):
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]
                file = tar.extractfile(member)
                if file is None or not member.name.endswith(".jpg"):
                    continue
                content = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
                pixels = decode_jpeg(content, ImageReadMode.RGB).permute(1, 2, 0)[None]
                block = pixels.permute(0, 3, 1, 2)
                yield interpolate(block, (SIZE, SIZE), mode="bicubic", antialias=True)


def _timed(batches: Iterator[Any], warm: int, count: int) -> float:
    for _ in islice(batches, warm):
        pass
    start = time.perf_counter()
    for _ in islice(batches, count):
        pass
    return time.perf_counter() - start


if __name__ == "__main__":
    main(sys.argv[1:])
