"""Every curated image tower with every curated text tower: shrunken, two updates on the CPU.

Depth, picture size and vocabulary shrink; widths stay as they are, since they are what must fit.
"""

import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import BertTokenizer

from mmscale.checkpoint.state import RunState
from mmscale.config.load import validate
from mmscale.config.schema import Config
from mmscale.contracts import Batch, InputSpec, World
from mmscale.engine.accelerate import AccelerateEngine
from mmscale.loss.objective import Objective
from mmscale.model.build import build_model
from mmscale.model.dual_encoder import Tokenizer
from mmscale.model.outline import config_of
from mmscale.model.registry import curated, curated_names, entries
from mmscale.parallel.device import choose
from mmscale.parallel.peers import Alone
from mmscale.training.part import Step
from mmscale.training.step import Learner, train_step

CAPTIONS = ["a red circle", "two dogs run over the green field", "a cat", "the small blue square"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({*" ".join(CAPTIONS).split()})]
SPECIAL = {
    "[PAD]": ("pad_token_id", "pad_index"),
    "[CLS]": ("bos_token_id", "cls_token_id", "bos_index"),
    "[SEP]": ("eos_token_id", "sep_token_id", "eos_index"),
}
STEPS = 2


@dataclass(frozen=True)
class TrainedPair:
    """Two towers that were trained together.

    Attributes:
        vision: Name of the image tower.
        text: Name of the text tower.
        vision_width: Features of the image tower, read from it.
        text_width: Features of the text tower.
        shared: Width of the embeddings: the smaller of both.
        heads: Parameters of the heads that were added, by side; none where widths agree.
        losses: Before each update.
    """

    vision: str
    text: str
    vision_width: int
    text_width: int
    shared: int
    heads: dict[str, int]
    losses: tuple[float, ...]

    def added(self) -> str:
        """The heads in words."""
        widths = {"image": self.vision_width, "text": self.text_width}
        sides = [
            f"{side} {widths[side]} → {self.shared} ({count:,})"
            for side, count in self.heads.items()
        ]
        return ", ".join(sides) or "none"


def all_pairs() -> list[tuple[str, str]]:
    """Names of every curated image tower with every curated text tower."""
    return list(product(curated_names("vision"), curated_names("text")))


def train_pairs(
    pairs: list[tuple[str, str]], tell: Callable[[TrainedPair], None] = lambda pair: None
) -> list[TrainedPair]:
    """Train each pair.

    Args:
        pairs: Names of towers.
        tell: Takes each pair when it was trained.
    """
    trained = []
    with tempfile.TemporaryDirectory() as folder:
        for vision, text in pairs:
            trained.append(train_pair(vision, text, Path(folder)))
            tell(trained[-1])
    return trained


def train_pair(vision: str, text: str, folder: Path) -> TrainedPair:
    """Two updates of a pair.

    Args:
        vision: Name of a curated image tower.
        text: Name of a curated text tower.
        folder: For configurations of Hugging Face's towers, kept for further pairs.
    """
    known = entries()
    widths = {"image": known[vision].width, "text": known[text].width}
    shared = min(widths.values())
    kinds = {
        side: {"kind": "identity" if width == shared else "linear"}
        for side, width in widths.items()
    }
    patch = 14 if "patch14" in vision else 16
    model = {
        "vision": {**shrunken(vision, folder, 2 * patch), "width": widths["image"]},
        "text": {**shrunken(text, folder, 2 * patch), "width": widths["text"]},
        "embed_dim": shared,
        "head": kinds,
    }
    config = validate(
        {
            "data": {"train": "none"},
            "model": model,
            "train": {"global_batch_size": len(CAPTIONS)},
            "engine": {"device": "cpu", "precision": "fp32"},
        }
    )
    return _train(config, vision, text, 2 * patch)


def shrunken(name: str, folder: Path, size: int) -> dict[str, Any]:
    """Settings of a tower of true width and little depth, with random weights."""
    source, _, rest = name.partition(":")
    if source == "hf":
        path = folder / rest.replace("/", "--")
        if not path.exists():
            _save(name, path, size)
        return {"name": f"hf:{path}", "weights": "random"}
    options: dict[str, Any] = {}
    if re.match(r"timm:(vit|beit)", name):
        options = {"depth": 1}
    elif name.startswith("timm:convnext"):
        options = {"depths": [1, 1, 1, 1]}
    return {"name": name, "weights": "random", "options": options}


def _save(name: str, path: Path, size: int) -> None:
    facts = {**curated()["vision"], **curated()["text"]}[name]
    layers = "n_layers" if "n_layers" in facts["config"] else "num_hidden_layers"
    config = config_of({**facts["config"], layers: 1})
    if "preprocessor" in facts:
        config.image_size = size
        config.save_pretrained(path)
        (path / "preprocessor_config.json").write_text(json.dumps(facts["preprocessor"]))
        return
    config.vocab_size = len(WORDS)
    for token, settings in SPECIAL.items():
        for setting in settings:
            if getattr(config, setting, None) is not None:
                setattr(config, setting, WORDS.index(token))
    config.save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(vocab=str(path / "vocab.txt")).save_pretrained(path)


def _train(config: Config, vision: str, text: str, size: int) -> TrainedPair:
    model, spec = build_model(config.model, size, seed=0)
    towers: Any = model
    heads = {side: sum(p.numel() for p in towers.head[side].parameters()) for side in towers.head}
    widths = towers.vision.width, towers.text.width
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    policy, peers = choose(config.engine), Alone()
    engine = AccelerateEngine(model.train(), config, policy, World())
    objective = Objective(config, peers)
    losses = []
    for step, batch in enumerate(_batches(spec)):
        record = train_step(
            Learner(engine, objective, peers, len(batch)),
            batch,
            Step(RunState(step), config.optim.lr),
        ).record
        assert record.applied, f"{vision} with {text}: the gradient of step {step} is not finite"
        losses.append(record.loss)
    after = dict(engine.module.named_parameters())
    engine.close()
    for part in ("vision.", "text."):
        moved = [n for n in before if n.startswith(part) and not torch.equal(before[n], after[n])]
        assert moved, f"{vision} with {text}: nothing of {part} was trained"
    assert all(map(math.isfinite, losses))
    added = {side: count for side, count in heads.items() if count}
    return TrainedPair(vision, text, *widths, config.model.embed_dim, added, tuple(losses))


def _batches(spec: InputSpec) -> Iterator[Batch]:
    tokens = Tokenizer(spec)(CAPTIONS)
    ids = torch.arange(len(CAPTIONS))
    generator = torch.Generator().manual_seed(0)
    shape = (len(CAPTIONS), 3, spec.image_size, spec.image_size)
    for _ in range(STEPS):
        yield Batch(
            image=torch.randn(shape, generator=generator),
            tokens=tokens,
            mask=tokens != spec.pad_token,
            image_ids=ids,
            match_ids=ids,
            labels=ids,
            keys=[f"{row}#0" for row in ids.tolist()],
            captions=CAPTIONS,
        )
