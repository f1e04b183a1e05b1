"""A trained model in the formats of others: OpenCLIP, Hugging Face, ONNX."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmscale.checkpoint.export_limits import FORMATS, advice, refusal
from mmscale.config.schema import Config
from mmscale.contracts import InputSpec
from mmscale.durable import publish
from mmscale.errors import ConfigError
from mmscale.model.dual_encoder import DualEncoder, Tokenizer

# Largest difference of a unit embedding's element between our model and an exported one.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Exported:
    """What is exported.

    Attributes:
        config: Of the run.
        encoder: The model on the CPU in fp32, in evaluation mode.
        spec: What it is fed.
        out: Folder that the files are going to lie in.
    """

    config: Config
    encoder: DualEncoder
    spec: InputSpec
    out: Path

    def sample(self) -> tuple[Tensor, Tensor]:
        """Pixels [2 3 h w] and tokens [2 t] to compare models on."""
        generator = torch.Generator().manual_seed(0)
        size = self.spec.image_size
        pixels = torch.rand(2, 3, size, size, generator=generator) * 2 - 1
        return pixels, Tokenizer(self.spec)(["a dog runs", "two children play in the deep snow"])


class InexpressibleError(ConfigError):
    """A format cannot express the model; what can is added where all of them are known."""


Writer = Callable[[Exported, Path], None]


def export(what: Exported, to: str) -> None:
    """Write the model in another format; the folder appears when it is whole and was checked.

    Args:
        what: The model.
        to: `open_clip`, `hf` or `onnx`.

    Raises:
        ConfigError: The format is unknown or cannot express the model, or the folder holds files.
    """
    require_exportable(what.config, to, what.out)
    aside = what.out.with_name(f".{what.out.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        with torch.no_grad():
            _write(what, to, aside)
        with suppress(FileNotFoundError):
            what.out.rmdir()
        publish(aside, what.out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def require_exportable(config: Config, to: str, out: Path) -> None:
    """Refuse what the configuration alone shows to be impossible, before a model is loaded.

    Raises:
        ConfigError: The format is unknown or cannot express the model, or the folder holds files.
    """
    if to not in FORMATS:
        raise ConfigError(f"--to {to}: give one of {', '.join(FORMATS)}")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"--out {out}: holds files already; name a new folder")
    if (reason := refusal(config, to)) is not None:
        raise ConfigError(f"{reason}; {advice(config, to)}")


def _write(what: Exported, to: str, folder: Path) -> None:
    try:
        _writers()[to](what, folder)
    except InexpressibleError as error:
        raise ConfigError(f"{error}; {advice(what.config, to)}") from error


def _writers() -> dict[str, Writer]:
    # Each brings its own library.
    from mmscale.checkpoint.export_hf import write_hf
    from mmscale.checkpoint.export_onnx import write_onnx
    from mmscale.checkpoint.export_openclip import write_openclip

    return {"open_clip": write_openclip, "hf": write_hf, "onnx": write_onnx}


def linear_map(
    head: nn.Module, width: int, setting: str
) -> tuple[Float[Tensor, "d f"], Float[Tensor, " d"]]:
    """A head as matrix and offset, whatever it is built of.

    Raises:
        ConfigError: The head is not a linear map.
    """
    wide = head.double()
    offset = wide(torch.zeros(1, width, dtype=torch.float64))[0]
    matrix = (wide(torch.eye(width, dtype=torch.float64)) - offset).T
    rows = torch.randn(8, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    differs = (wide(rows) - (rows @ matrix.T + offset)).abs().max() > 1e-9 * matrix.abs().max()
    head.float()
    if differs:
        raise InexpressibleError(
            f"{setting} is no linear map, and the format has no other projection"
        )
    return matrix.float().contiguous(), offset.float()


def require_no_offset(offset: Tensor, setting: str) -> None:
    """Refuse a projection with an offset where the format's has none."""
    if offset.abs().max() > 0:
        raise InexpressibleError(
            f"{setting} adds an offset (a bias, standardisation or BatchNorm), and the format's "
            "projection has none"
        )


def require_equal(ours: Tensor, theirs: Tensor, part: str) -> None:
    """Refuse to hand out a model that gives other embeddings.

    Raises:
        ConfigError: Unit rows differ by more than `TOLERANCE`.
    """
    difference = (nn.functional.normalize(ours) - nn.functional.normalize(theirs)).abs().max()
    if not difference <= TOLERANCE:
        raise InexpressibleError(
            f"{part}: the exported model's embeddings differ by {float(difference):.1e}: the "
            "format builds this tower in another way"
        )


def write_tokenizer(spec: InputSpec, folder: Path) -> bool:
    """Save the tokenizer's own files; False where it is the one built into OpenCLIP."""
    tokenizer: Any = getattr(spec.tokenize, "tokenizer", None)
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    if not hasattr(inner, "save_pretrained"):
        return False
    inner.save_pretrained(folder)
    return True


def preprocessing(spec: InputSpec) -> dict[str, Any]:
    """The evaluation transform in OpenCLIP's words."""
    return {
        "size": spec.image_size,
        "mode": "RGB",
        "mean": list(spec.mean),
        "std": list(spec.std),
        "interpolation": spec.interpolation,
        "resize_mode": "shortest",
    }


def write_json(path: Path, content: Any) -> None:
    """JSON for people and programs."""
    path.write_text(json.dumps(content, indent=2) + "\n")
