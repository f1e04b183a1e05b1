"""Zero-shot classification: each image is given the class whose prompts are most like it.

Class names, templates and the mean of the prompts are OpenCLIP's own.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mmscale.config.evaluation import EvalSetConfig
from mmscale.contracts import InputSpec, Peers
from mmscale.data.features import loaded
from mmscale.data.labelled import LabelledBatch, LabelledBatches, LabelledImages, open_labelled
from mmscale.data.lanes import sections
from mmscale.data.stream import pad
from mmscale.diagnostics.pairs import on_grid
from mmscale.engine.encode import Encoder, encode_images
from mmscale.errors import DataError, HaltError
from mmscale.parallel.peers import gather_objects, gather_rows

IMAGENET = "imagenet"
_BUILT_IN = ("openai", "simple")
_PLACE = "{}"
# The deepest list that is looked at.
DEEPEST = 5

Template = str | Callable[[str], str]


@dataclass(frozen=True)
class ClassSet:
    """Labelled images, and the prompts of their classes.

    Attributes:
        setting: That of its data, for messages.
        images: Where they lie, and the class of each.
        classes: Names in their order.
        templates: Each makes a prompt of a name.
        spec: What the model is fed.
        kept: Outputs of frozen towers, which the first evaluation leaves here; None: they learn.
    """

    setting: str
    images: LabelledImages
    classes: tuple[str, ...]
    templates: tuple[Template, ...]
    spec: InputSpec
    kept: dict[str, Any] | None = None


@dataclass(frozen=True)
class Predictions:
    """What a rank's images were taken for.

    Attributes:
        places: Place of each in the whole set.
        labels: Its class.
        classes: The most similar class; of several alike the first.
        ahead: How many classes are more similar than its own, or as similar and before it.
    """

    places: Int64[Tensor, " m"]
    labels: Int64[Tensor, " m"]
    classes: Int64[Tensor, " m"]
    ahead: Int64[Tensor, " m"]


def open_classes(setting: str, chosen: EvalSetConfig, spec: InputSpec, keeps: bool) -> ClassSet:
    """A set of kind `classes`.

    Args:
        setting: What the names of its settings begin with, such as `eval.sets.pets.`.
        chosen: Its settings.
        spec: What the model is fed.
        keeps: Its towers' outputs serve every evaluation.

    Raises:
        DataError: There are no images, a label is none of the classes, or a file is not a list.
    """
    assert chosen.classes is not None, "a rule between settings"
    names = _class_names(f"{setting}classes", chosen.classes)
    images = open_labelled(f"{setting}data", chosen.data, names, chosen.classes)
    templates = _templates(f"{setting}templates", chosen.templates or _BUILT_IN[0])
    return ClassSet(f"{setting}data", images, names, templates, spec, {} if keeps else None)


def classify(
    encoder: Encoder,
    chosen: ClassSet,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Predictions:
    """What this rank's share of the images is taken for. Collective.

    Args:
        encoder: Calls the model.
        chosen: The set.
        progress: Told this rank's images done and in all, then its classes'.

    Raises:
        DataError: More images than tolerated cannot be decoded.
        HaltError: The embeddings are not finite.
    """
    places, features = _image_features(encoder, chosen, progress)
    prompts = _Prompts(encoder, features, chosen.kept)
    columns = _classifier(prompts, chosen, progress)
    rows, _ = _units(encoder, features, prompts.last)
    _require_finite(encoder.peers, rows, columns)
    labels = torch.tensor(chosen.images.labels)[places]
    taken, ahead = [labels[:0]], [labels[:0]]
    numbers, grid = torch.arange(len(chosen.classes)), on_grid(columns)
    for part, own in zip(rows.split(256), labels.split(256), strict=True):
        similarity = on_grid(part) @ grid
        right = similarity.gather(1, own[:, None])
        before = numbers < own[:, None]
        ahead.append(((similarity > right) | ((similarity == right) & before)).sum(dim=1))
        taken.append(similarity.argmax(dim=1))
    return Predictions(places, labels, torch.cat(taken), torch.cat(ahead))


def class_figures(found: Predictions, classes: int, peers: Peers) -> dict[str, float]:
    """Accuracies in percent, and how many images and classes there are. Collective.

    Args:
        found: This rank's.
        classes: How many there are.
        peers: The ranks, whose counts are added up.

    Returns:
        `top1`; `top5` where there are so many classes; `mean_per_class`, the mean accuracy of the
        classes that have images; `images`; `classes`.
    """
    counted = torch.stack(
        [torch.ones_like(found.ahead), found.ahead < 1, found.ahead < DEEPEST], dim=1
    )
    counts = torch.zeros(classes, 3, dtype=torch.float64)
    counts.index_add_(0, found.labels, counted.double())
    counts = peers.total(counts)
    images, first, fifth = counts.sum(dim=0).tolist()
    there = counts[:, 0] > 0
    shares = counts[there, 1] / counts[there, 0]
    deep = {f"top{DEEPEST}": 100 * fifth / images} if classes >= DEEPEST else {}
    return {
        "top1": 100 * first / images,
        **deep,
        "mean_per_class": 100 * float(shares.mean()),
        "images": int(images),
        "classes": classes,
    }


def _image_features(
    encoder: Encoder, chosen: ClassSet, progress: Callable[[int, int], None]
) -> tuple[Int64[Tensor, " m"], Float[Tensor, "m f"]]:
    """Place and tower output of each of this rank's images."""
    if chosen.kept is not None and "places" in chosen.kept:
        return chosen.kept["places"], chosen.kept["image"]
    peers, size = encoder.peers, encoder.batch_size
    shares = sections(len(chosen.images.labels), peers.size)
    mine = shares[peers.rank]
    batches = LabelledBatches(chosen.images, chosen.spec, mine, size)
    loader = loaded(batches, encoder.workers)
    places: list[int] = []
    damaged: list[str] = []
    parts = []
    # As many calls on every rank, which ZeRO-3 needs.
    for index in range(-(-max(map(len, shares)) // size)):
        batch = next(loader) if index < len(batches) else LabelledBatch()
        parts.append(encode_images(encoder, batch.pixels))
        places += batch.places
        damaged += batch.damaged
        progress(min((index + 1) * size, len(mine)), len(mine))
    _require_most(chosen, gather_objects(peers, damaged), encoder.max_damaged)
    found = torch.tensor(places, dtype=torch.long), torch.cat(parts)
    if chosen.kept is not None:
        chosen.kept["places"], chosen.kept["image"] = found
    return found


def _require_most(chosen: ClassSet, damaged: list[list[str]], most: float) -> None:
    lines = [line for part in damaged for line in part]
    count = len(chosen.images.labels)
    if len(lines) > most * count or len(lines) == count:
        raise DataError(
            f"{chosen.setting}: {len(lines)} of {count} images cannot be decoded, more than "
            f"data.max_damaged={most} allows; the first: {lines[0]}"
        )


def _classifier(
    prompts: "_Prompts", chosen: ClassSet, progress: Callable[[int, int], None]
) -> Float[Tensor, "d classes"]:
    """A unit column a class, equal on every rank, by OpenCLIP's `build_zero_shot_classifier`."""
    from open_clip import build_zero_shot_classifier

    peers, count = prompts.encoder.peers, len(chosen.classes)
    share = -(-count // peers.size)
    # Every rank makes as many calls: past the end of the list, of its last class.
    mine = [min(peers.rank * share + index, count - 1) for index in range(share)]
    at_once = max(1, prompts.encoder.batch_size // len(chosen.templates))
    prompts.done = lambda calls: progress(min(calls * at_once, share), share)
    columns = build_zero_shot_classifier(
        prompts, prompts, [chosen.classes[row] for row in mine], chosen.templates, at_once
    )
    return gather_rows(peers, columns.T.contiguous())[:count].T


class _Prompts:
    """The text side of a model as OpenCLIP's functions call it: its tokenizer and `encode_text`.

    Attributes:
        last: A row of the text tower's newest output.
        done: Called with how many calls of `encode_text` are done.
    """

    done: Callable[[int], None]

    def __init__(self, encoder: Encoder, features: Tensor, kept: dict[str, Any] | None):
        self.encoder = encoder
        self.last = features[:0]
        self._features, self._kept = features[:1], kept
        self._calls = 0

    def __call__(self, texts: Sequence[str]) -> "_Tokens":
        return _Tokens(self.encoder.spec.tokenize(texts))

    def encode_text(self, tokens: "_Tokens", normalize: bool) -> Float[Tensor, "n d"]:
        """Unit rows, as OpenCLIP asks for them."""
        assert normalize, "OpenCLIP means unit rows"
        key, self._calls = f"text {self._calls}", self._calls + 1
        features = None if self._kept is None else self._kept.get(key)
        if features is None:
            features = self._tower(tokens)
            if self._kept is not None:
                self._kept[key] = features
        self.last = features[:1]
        unit = _units(self.encoder, self._features, features)[1]
        self.done(self._calls)
        return unit

    def _tower(self, tokens: "_Tokens") -> Float[Tensor, "n g"]:
        device, pad_token = self.encoder.device, self.encoder.spec.pad_token
        size = self.encoder.batch_size
        rows = tokens.rows
        outputs = []
        for start in range(0, len(rows), size):
            ids, mask = pad(rows[start : start + size], pad_token)
            output = self.encoder.call("text", ids.to(device), mask.to(device))
            outputs.append(output.float().cpu())
        return torch.cat(outputs)


@dataclass(frozen=True)
class _Tokens:
    """Prompts in token ids, which are sent to the device as they are padded."""

    rows: list[list[int]]

    def to(self, device: Any) -> "_Tokens":
        """Themselves."""
        return self


def _units(
    encoder: Encoder, image: Float[Tensor, "m f"], text: Float[Tensor, "n g"]
) -> tuple[Float[Tensor, "m d"], Float[Tensor, "n d"]]:
    """Tower outputs through the heads, which take both sides: of none, a row of zeros."""
    rows = image if len(image) else image.new_zeros(1, image.shape[1])
    with torch.no_grad():
        found = encoder.call("heads", rows.to(encoder.device), text.to(encoder.device))
    images, texts = (side.unit.float().cpu() for side in found[:2])
    return images[: len(image)], texts


def _require_finite(peers: Peers, rows: Tensor, columns: Tensor) -> None:
    finite = bool(rows.isfinite().all() and columns.isfinite().all())
    if not all(gather_objects(peers, finite)):
        raise HaltError(
            "the model's embeddings of labelled images or of prompts are not finite: its weights "
            "have overflowed, or what it computes from them in this precision; go on from the "
            "checkpoint before with a lower optim.lr or optim.clip_norm"
        )


def _class_names(setting: str, where: str) -> tuple[str, ...]:
    """Names of a file, or ImageNet's as OpenCLIP has them."""
    if where == IMAGENET:
        from open_clip import IMAGENET_CLASSNAMES

        return tuple(IMAGENET_CLASSNAMES)
    names = _listed(setting, where)
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise DataError(
            f"{setting}={where}: names {repeated!r} twice, and a prompt tells one class; name each "
            "once"
        )
    return names


def _templates(setting: str, where: str) -> tuple[Template, ...]:
    """Templates of a file, with `{}` where the name stands, or OpenCLIP's."""
    if where in _BUILT_IN:
        import open_clip

        return tuple(getattr(open_clip, f"{where.upper()}_IMAGENET_TEMPLATES"))
    templates = _listed(setting, where)
    for template in templates:
        if template.count(_PLACE) != 1 or template.count("{") + template.count("}") != 2:
            raise DataError(
                f"{setting}={where}: {template!r} must have {_PLACE} once, where a class's name is "
                "put, and no other braces"
            )
    return templates


def _listed(setting: str, where: str) -> tuple[str, ...]:
    """Lines of a text file, or the entries of a list in JSON.

    Raises:
        DataError: It cannot be read, or an entry is empty.
    """
    try:
        text = Path(where).read_text("utf-8-sig")
        entries = json.loads(text) if text.lstrip().startswith("[") else text.rstrip().split("\n")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{setting}={where}: cannot be read ({error}); name a file with a line each, or a list "
            "in JSON"
        ) from error
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, str) or not entry.strip():
            raise DataError(
                f"{setting}={where}: entry {number} is empty or no text; write one or remove it"
            )
    return tuple(entry.strip() for entry in entries)
