"""Times a query over an index of random rows, as `mmscale search` runs it: mapped, then compared.

python tools/measure_search.py [ROWS] [WIDTH] [THREADS]

Rows are in the memory of the system, as after a first query. Finding only: neither the program's
start nor the towers.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from mmscale.evaluation.image_index import ImageIndex
from mmscale.evaluation.search import found_in

QUERIES = 20
TOP = 10


def main(words: list[str]) -> None:
    rows, width, threads = [*map(int, words), *(1_000_000, 512, 2)[len(words) :]]
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.safetensors"
        index_of_noise(rows, width).save(path)
        seconds, opened = [], time.perf_counter()
        index = ImageIndex.load(path)
        print(f"opened in {time.perf_counter() - opened:.3f} s")
        for query in F.normalize(torch.randn(QUERIES, width), dim=1):
            began = time.perf_counter()
            found_in(index, query, TOP)
            seconds.append(time.perf_counter() - began)
    middle = sorted(seconds)[len(seconds) // 2]
    print(
        f"{rows:,} rows of {width}, {threads} threads: median {middle:.3f} s a query, "
        f"first {seconds[0]:.3f}, slowest {max(seconds):.3f} (of {QUERIES})"
    )


def index_of_noise(rows: int, width: int) -> ImageIndex:
    """Unit rows of noise, each with a key and a caption."""
    lines = [b'{"key": "%08d", "captions": ["a caption"]}' % row for row in range(rows)]
    edges = torch.tensor([0, *map(len, lines)]).cumsum(0)
    names = torch.frombuffer(bytearray(b"".join(lines)), dtype=torch.uint8)
    unit = torch.empty(rows, width).normal_()
    for part in unit.split(10_000):
        part /= part.norm(dim=1, keepdim=True)
    return ImageIndex(unit, torch.arange(rows), names, edges, "noise")


if __name__ == "__main__":
    main(sys.argv[1:])
