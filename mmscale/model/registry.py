"""What is known of towers, by figure, and in words: committed data, read from the built models.

`curated.yaml` names the towers and describes Hugging Face's; `registry.json` holds their figures
and those of every OpenCLIP configuration. Neither needs torch.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from mmscale.errors import ConfigError
from mmscale.model.presets import PRESETS
from mmscale.model.sources import did_you_mean

FOLDER = Path(__file__).parent
FIGURES, CURATED = FOLDER / "registry.json", FOLDER / "curated.yaml"
BYTES_OF_FP32 = 4


@dataclass(frozen=True)
class TowerEntry:
    """A tower, or a whole OpenCLIP model.

    Attributes:
        name: As `model.vision.name`, `model.text.name` or `model.preset` takes it.
        part: `vision`, `text` or `pair`.
        width: Of an embedding: the tower's features, or a pair's shared width.
        pooling: How tokens become one vector.
        parameters: Of everything that an embedding passes; the scale is not counted.
        flops: Of one sample forward, two for each multiply-add; a caption of `flops_tokens`.
        sequence_width: Of a token; None for a pair.
        blocks: What `frozen` counts; None for a pair.
        flops_tokens: Tokens of that caption; None for an image tower.
        licence: As the model card states; None where it states none, or weights come by tag.
        image_size: Pixels, side of the square.
        mean: For pixels in [0, 1].
        std: Likewise.
        interpolation: Of the resizing.
        image_tokens: Tokens that the image tower gives besides its pooled features.
        context_length: Most tokens of a caption that the text tower takes.
        vocabulary: Token embeddings.
        fault: Why the model as it lies cannot be trained; None where nothing was found.
        parts: Of a pair: `parameters`, `flops`, `sequence_width` and `pooling` of each tower.
    """

    name: str
    part: str
    width: int
    pooling: str
    parameters: int
    flops: int
    sequence_width: int | None = None
    blocks: int | None = None
    flops_tokens: int | None = None
    licence: str | None = None
    image_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    image_tokens: int | None = None
    context_length: int | None = None
    vocabulary: int | None = None
    fault: str | None = None
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def adapter(self) -> str:
        """The library: `timm`, `hf` or `openclip`."""
        return self.name.partition(":")[0]

    @property
    def memory_bytes(self) -> int:
        """Of the weights in fp32."""
        return BYTES_OF_FP32 * self.parameters

    def to_json(self) -> dict[str, Any]:
        """Every figure that there is."""
        known = {name: value for name, value in asdict(self).items() if value not in (None, {})}
        derived = {"adapter": self.adapter, "memory_bytes": self.memory_bytes}
        return {**known, **derived, "licence": self.licence}


@cache
def entries() -> dict[str, TowerEntry]:
    """Every registered model by name."""
    rows = json.loads(FIGURES.read_text("utf-8"))
    return {row["name"]: entry_of(row) for row in rows}


def entry_of(row: dict[str, Any]) -> TowerEntry:
    """An entry from its line in `registry.json`."""
    lists = {name: tuple(row[name]) for name in ("mean", "std") if row.get(name) is not None}
    return TowerEntry(**{**row, **lists})


@cache
def curated() -> dict[str, dict[str, Any]]:
    """`curated.yaml`: by part, name -> licence, configuration, preprocessor."""
    return yaml.safe_load(CURATED.read_text("utf-8"))


def curated_names(part: str) -> list[str]:
    """Curated towers of `vision` or `text`."""
    return list(curated()[part])


def find(name: str) -> TowerEntry | None:
    """A registered model by its full name, or by its name alone where only one is called so."""
    known = entries()
    if name in known:
        return known[name]
    same = [entry for full, entry in known.items() if name in _short(full)]
    return same[0] if len(same) == 1 else None


def unknown(name: str) -> ConfigError:
    """What to say about a name without a source that is not registered."""
    near = did_you_mean(name, [short for full in entries() for short in _short(full)])
    return ConfigError(
        f"mmscale models {name}: not registered{near}; any other model is read if you say where it "
        f"comes from: timm:NAME, hf:NAME_OR_PATH or openclip:NAME."
    )


def _short(full: str) -> set[str]:
    name = full.partition(":")[2]
    return {name, name.rpartition("/")[2]}


GOOD_ON = "cpu"  # where each pair of curated towers was trained (docs/models.md)


def overview(failing: dict[str, dict[str, str]]) -> str:
    """Curated towers, presets and OpenCLIP's models.

    Args:
        failing: By kind of device, towers that are known to fail there.
    """
    known = entries()
    vision = [known[name] for name in curated_names("vision")]
    text = [known[name] for name in curated_names("text")]
    pairs = [entry for entry in known.values() if entry.part == "pair"]
    return "\n\n".join(
        [
            "Image towers (model.vision.name)\n" + tower_table(vision, failing),
            "Text towers (model.text.name)\n" + tower_table(text, failing),
            "Presets (model.preset)\n" + presets(),
            "OpenCLIP's models (model.preset)\n" + tower_table(pairs, failing),
            "FLOPs: one sample forward, two for each multiply-add; a caption of 77 tokens, or of "
            "the tower's own length if\nthat is shorter. Memory: the weights in fp32. Any other "
            "model is read: mmscale models timm:NAME or hf:NAME_OR_PATH",
        ]
    )


def tower_table(chosen: Sequence[TowerEntry], failing: dict[str, dict[str, str]]) -> str:
    """One line a model."""
    rows = [columns(entry, failing) for entry in chosen]
    return aligned([list(rows[0]), *(list(row.values()) for row in rows)])


def columns(entry: TowerEntry, failing: dict[str, dict[str, str]]) -> dict[str, str]:
    """Heading -> cell of one model."""
    cells = {"name": entry.name, "width": str(entry.width)}
    if entry.image_size is not None:
        cells |= {"pixels": str(entry.image_size), "mean": triple(entry.mean)}
        cells |= {"std": triple(entry.std), "image tokens": str(entry.image_tokens)}
    if entry.context_length is not None:
        cells |= {"context": str(entry.context_length), "vocabulary": f"{entry.vocabulary:,}"}
    cells |= {"pooling": entry.pooling}
    if entry.blocks is not None:
        cells |= {"blocks": str(entry.blocks)}
    return cells | {
        "parameters": f"{entry.parameters / 1e6:,.1f} M",
        "FLOPs": f"{entry.flops / 1e9:,.1f} G",
        "memory": f"{entry.memory_bytes / 1e6:,.0f} MB",
        "licence": licence(entry),
        "good on": ", ".join(good_on(entry)) or "untried",
        "fails on": ", ".join(fails_on(entry, failing)) or "-",
    }


def triple(values: Sequence[float] | None) -> str:
    """One number where the channels agree."""
    shown = [f"{value:.3f}".rstrip("0").rstrip(".") for value in values or ()]
    return shown[0] if len(set(shown)) == 1 else "/".join(shown)


def licence(entry: TowerEntry) -> str:
    """As the model card states it."""
    return entry.licence or ("by weights" if entry.part == "pair" else "none stated")


def good_on(entry: TowerEntry) -> list[str]:
    """Kinds of device on which it was trained in a test."""
    tried = {*curated_names("vision"), *curated_names("text")}
    return [GOOD_ON] if entry.name in tried else []


def fails_on(entry: TowerEntry, failing: dict[str, dict[str, str]]) -> list[str]:
    """Kinds of device on which it is known to fail."""
    return [device for device, towers in failing.items() if entry.name in towers]


def describe_tower(entry: TowerEntry, failing: dict[str, dict[str, str]]) -> str:
    """Everything that is known of one model, a line each."""
    rows = [["adapter", entry.adapter], ["part", entry.part]]
    rows += [[heading, cell] for heading, cell in columns(entry, failing).items()]
    if entry.sequence_width is not None:
        rows.append(["token width", str(entry.sequence_width)])
    if entry.interpolation is not None:
        rows.append(["resizing", entry.interpolation])
    if entry.flops_tokens is not None:
        rows.append(["FLOPs of", f"a caption of {entry.flops_tokens} tokens"])
    for part, facts in entry.parts.items():
        rows.append(
            [
                f"its {part}",
                f"{facts['parameters'] / 1e6:,.1f} M parameters, {facts['flops'] / 1e9:,.1f} G "
                f"FLOPs, tokens {facts['sequence_width']} wide, pooling {facts['pooling']}",
            ]
        )
    if entry.fault is not None:
        rows.append(["cannot be trained", entry.fault])
    return aligned(rows)


def entry_json(entry: TowerEntry, failing: dict[str, dict[str, str]]) -> dict[str, Any]:
    """The entry with its devices."""
    devices = {"good_on": good_on(entry), "fails_on": fails_on(entry, failing)}
    return {**entry.to_json(), **devices}


def presets() -> str:
    """One line a preset, its towers' true widths and what stands between them."""
    known = entries()
    rows = [["name", "image tower", "width", "text tower", "width", "shared width"]]
    for name, settings in PRESETS.items():
        vision, text = known[settings["vision"]["name"]], known[settings["text"]["name"]]
        shared = str(settings["embed_dim"])
        rows.append([name, vision.name, str(vision.width), text.name, str(text.width), shared])
    rows.append(["openclip:NAME", "its own", "", "its own", "", "its own"])
    return aligned(rows)


def aligned(rows: Iterable[Sequence[str]]) -> str:
    """Cells under one another."""
    cells = [list(row) for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )
