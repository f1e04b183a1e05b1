"""Made-up inputs and every kind of term: what the tests of the losses go through."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from mmscale.config.loss import TERMS as SETTINGS
from mmscale.config.loss import AnyTerm, LossConfig
from mmscale.config.values import Ramp, whole_steps
from mmscale.contracts import START, Bank, Embeddings, LossInput, Peers, Prototypes, Taught
from mmscale.loss.mining import Mining
from mmscale.loss.term import Given, compute

WIDTH, CLUSTERS, CLASSES = 6, 4, 3
# Two images with several captions, in the order of the golden table.
IDS = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4])

# Every kind of term, and the options that take another path.
TERMS: dict[str, dict[str, Any]] = {
    "infonce": {},
    "infonce own temperature": {"temperature": 0.05},
    "infonce smoothed": {"label_smoothing": 0.1},
    "infonce hard": {},
    "infonce smoothed semi-hard": {"label_smoothing": 0.1},
    "siglip": {},
    "siglip hard": {},
    "dcl": {},
    "dcl semi-hard": {},
    "ntxent": {},
    "supcon": {},
    "supcon scaled": {"base_temperature": 0.07},
    "hinge": {},
    "hinge all": {"hardness": 0.0},
    "hinge mixed": {"hardness": 0.3, "semi_hard": True},
    "hn_nce": {},
    "hn_nce without positives": {"alpha": 0.0, "beta": 1.0},
    "spectral": {},
    "prototypes": {},
    "vicreg": {},
    "barlow": {},
    "decorrelation": {},
    "alignment": {},
    "uniformity": {},
    "regression": {},
    "diversity": {"floor": 1.0},
    "distillation": {},
    "distillation by id": {"alpha": 0.0},
    "teacher": {"model": "wider"},
    "teacher own temperatures": {"model": "wider", "temperature": 0.2, "teacher_temperature": 0.1},
    "teacher feature": {"model": "as wide", "form": "feature"},
    "anchor": {},
    "anchor affinity": {"form": "affinity"},
    "l2_start": {},
    "matching": {},
    "classification": {},
    "matryoshka": {"widths": [2, 4]},
    "matryoshka hard": {"widths": [3], "weights": [0.5], "of": {"kind": "siglip"}},
    "matryoshka of views": {"widths": [2, 5], "of": {"kind": "ntxent", "temperature": 0.2}},
}
# What of these mines, and how.
MINING = {
    "infonce hard": Mining("hard", 0.3, 1.0),
    "infonce smoothed semi-hard": Mining("semi_hard", 0.5, 0.6),
    "siglip hard": Mining("hard", 0.4, 0.7),
    "dcl semi-hard": Mining("semi_hard", 0.5, 1.0),
    "matryoshka hard": Mining("hard", 0.4, 0.7),
}
KINDS = list(SETTINGS)
# Those that contrast with remembered rows.
WITH_BANK = (
    "infonce",
    "infonce smoothed",
    "siglip",
    "dcl",
    *MINING,
    "hinge",
    "hn_nce",
    "distillation",
    "distillation by id",
    "matryoshka",
)


def term(name: str) -> AnyTerm:
    """The settings of a case."""
    kind = name.split(" ")[0]
    return LossConfig.model_validate({"terms": [{"kind": kind, **TERMS[name]}]}).terms[0]


def loss(name: str, rows: LossInput, peers: Peers) -> torch.Tensor:
    """A case's loss over this rank's rows."""

    def at(ramp: Ramp) -> float:
        return ramp.at(rows.step, whole_steps)

    value = compute(term(name), Given(rows, peers, at, MINING.get(name)))
    assert value is not None
    return value.loss


def embeddings(projected: torch.Tensor) -> Embeddings:
    """A head's outputs as the model hands them over."""
    wide = projected.to(torch.promote_types(projected.dtype, torch.float32))
    return Embeddings(projected, projected, F.normalize(wide, dim=1))


def leaves(ids: torch.Tensor, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict:
    """What a loss may have a gradient to: outputs of the heads, scale, bias, fusion's logits."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    rows = len(ids)
    return {
        "image": draw(rows, WIDTH),
        "text": draw(rows, WIDTH),
        "scale": torch.tensor([7.0], dtype=torch.promote_types(dtype, torch.float32)),
        "bias": torch.tensor([-3.0], dtype=torch.promote_types(dtype, torch.float32)),
        "matching": draw(rows, 2),
        "classes": draw(rows, CLASSES),
    }


def made_up(leaf: dict, ids: torch.Tensor, seed: int = 1, with_bank: bool = False) -> LossInput:
    """The rest of what the engine makes of a batch, without a gradient."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        rows = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return F.normalize(rows, dim=1).to(leaf["scale"].dtype)

    def taught(width: int) -> Taught:
        scale = torch.tensor([12.0], dtype=leaf["scale"].dtype)
        return Taught(draw(rows, width), draw(rows, width), scale)

    rows = len(ids)
    bank = None
    if with_bank:
        # Two empty slots; the rest holds rows of the batch's first id too.
        slots = torch.tensor([-1, int(ids[0]), 90, 91, int(ids[0]), -1, 92])
        bank = Bank(draw(7, WIDTH), draw(7, WIDTH), slots)
    scales = torch.linspace(0.1, 0.3, CLUSTERS, dtype=leaf["scale"].dtype)
    return LossInput(
        image=embeddings(leaf["image"]),
        text=embeddings(leaf["text"]),
        ids=ids,
        scale=leaf["scale"],
        bias=leaf["bias"],
        # At step 0 a batch without labels is an error.
        step=1,
        labels=torch.where(ids % 5 == 4, -1, ids % CLASSES),
        momentum_image=draw(rows, WIDTH),
        momentum_text=draw(rows, WIDTH),
        bank=bank,
        matching=leaf["matching"],
        matching_targets=(torch.arange(rows) % 3 == 0).long(),
        class_logits=leaf["classes"],
        prototypes=(Prototypes(draw(CLUSTERS, WIDTH), scales, ids % CLUSTERS),),
        teachers={"wider": taught(WIDTH + 3), "as wide": taught(WIDTH), START: taught(WIDTH)},
        # Of the weights: here of one of them.
        distance=leaf["scale"].square().sum(),
    )


def share(rows: LossInput, rank: int, world: int) -> LossInput:
    """A rank's neighbouring rows."""
    size = len(rows.ids) // world

    def cut(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value[rank * size : (rank + 1) * size]
        return Embeddings(cut(value.raw), cut(value.projected), cut(value.unit))

    return replace(
        rows,
        **{
            name: cut(getattr(rows, name))
            for name in ("image", "text", "ids", "labels", "momentum_image", "momentum_text")
        },
        matching=cut(rows.matching),
        matching_targets=cut(rows.matching_targets),
        class_logits=cut(rows.class_logits),
        prototypes=tuple(replace(one, cluster=cut(one.cluster)) for one in rows.prototypes),
        teachers=of_rows(rows.teachers, cut),
    )


def of_rows(
    teachers: Mapping[str, Taught], choose: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, Taught]:
    """Some of the rows that teachers made."""
    return {
        name: replace(taught, image=choose(taught.image), text=choose(taught.text))
        for name, taught in teachers.items()
    }


def value_and_gradients(
    name: str,
    leaf: dict,
    of: Callable[[dict], LossInput],
    peers: Peers,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A case's loss and its gradient to every leaf, zero where it has none."""
    leaf = {key: value.clone().requires_grad_() for key, value in leaf.items()}
    value = loss(name, of(leaf), peers)
    found = torch.autograd.grad(value, list(leaf.values()), allow_unused=True)
    gradients = {
        key: torch.zeros_like(leaf[key]) if grad is None else grad
        for key, grad in zip(leaf, found, strict=True)
    }
    return value.detach(), gradients
