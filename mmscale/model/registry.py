"""What is known of towers, by figure: committed data, each figure read from the built model.

`curated.yaml` names the towers and describes Hugging Face's; `registry.json` holds their figures
and those of every OpenCLIP configuration. Neither needs torch.
"""

import json
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from mmscale.errors import ConfigError
from mmscale.model.sources import did_you_mean

FOLDER = Path(__file__).parent
FIGURES, CURATED = FOLDER / "registry.json", FOLDER / "curated.yaml"
BYTES_OF_FP32 = 4


@dataclass(frozen=True)
class Entry:
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
def entries() -> dict[str, Entry]:
    """Every registered model by name."""
    rows = json.loads(FIGURES.read_text("utf-8"))
    return {row["name"]: entry_of(row) for row in rows}


def entry_of(row: dict[str, Any]) -> Entry:
    """An entry from its line in `registry.json`."""
    lists = {name: tuple(row[name]) for name in ("mean", "std") if row.get(name) is not None}
    return Entry(**{**row, **lists})


@cache
def curated() -> dict[str, dict[str, Any]]:
    """`curated.yaml`: by part, name -> licence, configuration, preprocessor."""
    return yaml.safe_load(CURATED.read_text("utf-8"))


def curated_names(part: str) -> list[str]:
    """Curated towers of `vision` or `text`."""
    return list(curated()[part])


def find(name: str) -> Entry | None:
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
