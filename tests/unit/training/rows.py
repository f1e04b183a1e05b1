"""Rows as the update hands them to parts, filled with noise."""

import torch

from mmscale.contracts import Embeddings, Features, LossInput


def features(rows: int, width: int) -> Features:
    """Both towers' outputs."""
    return Features(torch.randn(rows, width), torch.randn(rows, width))


def loss_input(rows: int, width: int, step: int = 0) -> LossInput:
    """Embeddings of as many pairs, each of an image of its own."""

    def side() -> Embeddings:
        unit = torch.nn.functional.normalize(torch.randn(rows, width), dim=1)
        return Embeddings(unit, unit, unit)

    return LossInput(side(), side(), torch.arange(rows), torch.ones(1), step)
