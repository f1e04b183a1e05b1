"""A dual encoder over features that are given: heads alone are trained, a run takes a second.

The model, the objective, the update and the engine are those of a real run; only the towers and the
stream are stood in for. Settings are `key=value` words like any other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from mmscale.checkpoint.state import RunState
from mmscale.config.load import validate, with_words
from mmscale.config.schema import Config
from mmscale.contracts import Batch, World
from mmscale.data.features import FeatureTable
from mmscale.diagnostics.pairs import Pairs
from mmscale.engine.accelerate import AccelerateEngine
from mmscale.engine.optimizer import rate_factor
from mmscale.loss.objective import Objective
from mmscale.model.batch_norm import connect_batch_norms
from mmscale.model.build import drawing_from
from mmscale.model.heads import Head
from mmscale.model.scale import LogitScale
from mmscale.model.two_tower import TwoTower
from mmscale.parallel.device import choose
from mmscale.parallel.peers import Alone
from mmscale.training.part import Step
from mmscale.training.parts.queue import Queue, RowBank
from mmscale.training.step import Learner, train_step


@dataclass(frozen=True)
class Features:
    """Rows of both towers; row i belongs together.

    Attributes:
        image: Image features.
        text: Caption features.
        ids: Whose image each row is.
    """

    image: Float[Tensor, "n f"]
    text: Float[Tensor, "n g"]
    ids: Int64[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, chosen: Tensor) -> "Features":
        """Some of the rows."""
        return Features(self.image[chosen], self.text[chosen], self.ids[chosen])

    @classmethod
    def of(cls, table: FeatureTable, captions: int, most: int) -> "Features":
        """The first good samples with their first captions, a row each, at most so many rows."""
        pairs = [
            (place, int(table.first[place]) + offset)
            for place in table.good.nonzero()[:, 0].tolist()[: most // captions]
            for offset in range(min(captions, int(table.first[place + 1] - table.first[place])))
        ]
        images, texts = (torch.tensor(column) for column in zip(*pairs, strict=True))
        return cls(table.image[images], table.text[texts], table.image_ids[images])


Told = Callable[[int, "Model"], None]
Spoil = Callable[[Features], Features]


class _Absent(nn.Module):
    """A tower whose features are given."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width


class Model:
    """A run over given features.

    Args:
        config: Its settings.
        pairs: What it is trained on.
        spoil: What happens to each batch on its way.
    """

    def __init__(self, config: Config, pairs: Features, spoil: Spoil = lambda batch: batch):
        self.config, self._pairs, self._spoil = config, pairs, spoil
        self._generator = torch.Generator().manual_seed(config.run.seed)
        model = _model(config, pairs)
        policy, peers = choose(config.engine), Alone()
        for modality, rows in (("image", pairs.image), ("text", pairs.text)):
            head: Any = model.head[modality]
            if head.fit_rows:
                head.fit(rows[: head.fit_rows])
        connect_batch_norms(model, peers)
        self._engine = AccelerateEngine(model.train(), config, policy, World())
        self._objective = Objective(config, peers)
        size, unique = config.negatives.queue.slots(len(pairs))
        bank = RowBank(size, config.model.embed_dim, unique, policy.device)
        self._parts = [Queue(bank, peers, lambda step: 1.0, of_momentum=False)] if size else []

    def train(self, steps: int, told: Told = lambda step, model: None) -> None:
        """Some updates; `told` is called before the first and after each."""
        config, rows = self.config, min(self.config.train.global_batch_size, len(self._pairs))
        warmup = min(steps, config.optim.warmup.steps(steps, rows))
        told(0, self)
        for step in range(steps):
            chosen = torch.randperm(len(self._pairs), generator=self._generator)[:rows]
            factor = rate_factor(step, steps, warmup, config.optim.schedule)
            train_step(
                Learner(self._engine, self._objective, Alone(), rows),
                _batch(self._spoil(self._pairs.rows(chosen))),
                Step(RunState(step), config.optim.lr * factor, factor),
                self._parts,
            )
            told(step + 1, self)

    def embed(self, pairs: Features) -> Pairs:
        """Held-out pairs through the heads as they are now."""
        self._engine.module.eval()
        with torch.no_grad():
            image, text, scale, _ = self._engine.call("heads", pairs.image, pairs.text)
        self._engine.module.train()
        return Pairs(
            image.unit, text.unit, pairs.ids, pairs.ids, pairs.image, pairs.text, float(scale)
        )

    def weights(self) -> dict[str, Tensor]:
        """A copy of every trained weight."""
        return {name: weights.clone() for name, weights in self._engine.masters()}

    def close(self) -> None:
        """Free the engine."""
        self._engine.close()


def without_data(words: Sequence[str]) -> Config:
    """A configuration from `key=value` words alone: data and towers are not looked at."""
    return with_words(validate({"data": {"train": "none"}}), words)


def _model(config: Config, pairs: Features) -> TwoTower:
    heads: dict[str, nn.Module] = {}
    for part, (modality, rows) in enumerate((("image", pairs.image), ("text", pairs.text)), 2):
        with drawing_from(config.run.seed, part):
            side = config.model.head.of(modality)
            heads[modality] = Head(rows.shape[1], config.model.embed_dim, side)
    towers = (_Absent(pairs.image.shape[1]), _Absent(pairs.text.shape[1]))
    return TwoTower(*towers, heads, LogitScale(config.model.logit_scale))


def _batch(rows: Features) -> Batch:
    return Batch(
        image=rows.image,
        tokens=rows.text,
        mask=None,
        image_ids=rows.ids,
        match_ids=rows.ids,
        labels=torch.full_like(rows.ids, -1),
        keys=[str(number) for number in rows.ids.tolist()],
        captions=[""] * len(rows),
    )
