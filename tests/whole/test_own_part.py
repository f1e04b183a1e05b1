"""A part of one's own: a class, and its place in the list; checkpoints keep what it remembers."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mmscale.contracts import Batch, LossInput, NamedTensor
from mmscale.training import build
from mmscale.training.part import Part, StepResult
from tests.ranks.launch import run_on_ranks
from tests.whole.small_run import metrics, words_for, write_settings
from tests.whole.stops import live_until


class MeanImage(Part):
    """The mean of all image embeddings so far: its length in the log, itself in checkpoints."""

    name = "mean_image"
    has_tensors = True

    def __init__(self, width: int):
        self._total, self._rows = torch.zeros(width), 0

    def follow(self, rows: LossInput, batch: Batch) -> None:
        self._total += rows.image.unit.sum(dim=0)

    def observe(self, result: StepResult, state) -> None:
        self._rows += len(result.batch.keys)

    def figures(self) -> Mapping[str, float]:
        return {"mean_image/rows": self._rows, "mean_image/length": float(self._total.norm())}

    def state(self) -> dict[str, int]:
        return {"rows": self._rows}

    def load(self, state: Mapping[str, int]) -> None:
        self._rows = state["rows"]

    def tensors(self) -> Iterator[NamedTensor]:
        yield NamedTensor(f"{self.name}.total", self._total, {})

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._total.copy_(tensors["total"])


def life(words: list[str], first: int, stop_at: int | None) -> int:
    """One process of a run with the part in it."""
    others = build._balance
    build._balance = lambda stage: [*others(stage), MeanImage(stage.config.model.embed_dim)]
    return live_until(words, first, stop_at)


def figures(run_dir) -> list[tuple]:
    wanted = ("step", "loss", "mean_image/rows", "mean_image/length")
    return [tuple(line[name] for name in wanted) for line in metrics(run_dir) if "loss" in line]


def test_a_part_in_one_class_and_one_line_keeps_its_place(synthetic, tmp_path):
    settings = write_settings(tmp_path)
    words = [*words_for(synthetic, settings), "train.duration=8 steps", "guard.action=off"]

    def live(name: str, first: int, stop_at: int | None) -> int:
        given = [*words, f"run.dir={tmp_path / name}"]
        return run_on_ranks(1, life, given, first, stop_at, join=False)[0]

    assert live("whole", 0, None) == 0
    assert live("stopped", 0, 3) == 143
    assert live("stopped", 3, None) == 0
    whole = figures(tmp_path / "whole")
    assert [line[2] for line in whole] == [16 * step for step in range(8)]
    assert whole[-1][3] > 0
    assert figures(tmp_path / "stopped") == whole
