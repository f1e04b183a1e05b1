"""A trained model in the formats of others, and what each of these cannot express."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmscale.config.model import HeadConfig
from mmscale.config.schema import Config
from mmscale.contracts import InputSpec
from mmscale.errors import ConfigError
from mmscale.model.adapters import adapted, merge_adapter
from mmscale.model.dual_encoder import DualEncoder, Tokenizer
from mmscale.model.presets import is_whole_hf, is_whole_openclip
from mmscale.outputs import publish

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
        page: Of the hub, ORG/NAME, if they are going to lie there and not on this machine.
        int8: Quantise ONNX graphs, and what that costs; None: leave them as they are.
    """

    config: Config
    encoder: DualEncoder
    spec: InputSpec
    out: Path
    page: str | None = None
    int8: "Cost | None" = None

    def sample(self) -> tuple[Tensor, Tensor]:
        """Pixels [2 3 h w] and tokens [2 t] to compare models on."""
        generator = torch.Generator().manual_seed(0)
        size = self.spec.image_size
        pixels = torch.rand(2, 3, size, size, generator=generator) * 2 - 1
        return pixels, Tokenizer(self.spec)(["a dog runs", "two children play in the deep snow"])


class InexpressibleError(ConfigError):
    """A format cannot express the model; what can is added where all of them are known."""


Writer = Callable[[Exported, Path], None]
# Towers as an engine calls them: `image` and `text` give rows, `heads` their unit rows.
Call = Callable[..., Any]
# Of graphs in fp32 and the same in int8: figures by name, as they are written beside them.
Cost = Callable[[Call, Call], dict[str, Any]]


def export(what: Exported, to: str) -> None:
    """Write the model in another format; the folder appears when it is whole and was checked.

    Args:
        what: The model.
        to: One of `FORMATS`.

    Raises:
        ConfigError: The format is unknown or cannot express the model, or the folder holds files.
    """
    require_exportable(what.config, to, what.out)
    aside = what.out.with_name(f".{what.out.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        with torch.no_grad():
            if to != "adapter":
                _merge(what)
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


def _merge(what: Exported) -> None:
    """Make adapters part of the weights that they stand beside.

    Raises:
        ConfigError: The embeddings change.
    """
    model = what.encoder.model
    towers = [tower for tower in (model.vision, model.text) if adapted(tower)]
    if not towers:
        return
    pixels, tokens = what.sample()
    image, text = what.encoder.encode_image(pixels), what.encoder.encode_text(tokens)
    for tower in towers:
        merge_adapter(tower)
    require_equal(image, what.encoder.encode_image(pixels), "the image tower's merged adapter")
    require_equal(text, what.encoder.encode_text(tokens), "the text tower's merged adapter")


def _write(what: Exported, to: str, folder: Path) -> None:
    try:
        _writers()[to](what, folder)
    except InexpressibleError as error:
        raise ConfigError(f"{error}; {advice(what.config, to)}") from error


def _writers() -> dict[str, Writer]:
    # Each brings its own library.
    from mmscale.checkpoint.export_adapter import write_adapters
    from mmscale.checkpoint.export_clip import write_clip
    from mmscale.checkpoint.export_hf import write_hf
    from mmscale.checkpoint.export_onnx import write_onnx
    from mmscale.checkpoint.export_openclip import write_openclip
    from mmscale.checkpoint.export_sentence import write_sentence_transformers

    return {
        "open_clip": write_openclip,
        "hf": write_hf,
        "onnx": write_onnx,
        "sentence_transformers": write_sentence_transformers,
        "adapter": write_adapters,
        "clip": write_clip,
    }


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
        "resize_mode": spec.resize,
    }


def write_json(path: Path, content: Any) -> None:
    """JSON for people and programs."""
    path.write_text(json.dumps(content, indent=2) + "\n")


# Options of timm's that OpenCLIP passes on, or that act in training only.
TIMM_OPTIONS = ("drop_rate", "drop_path_rate")
POOLINGS_OF_OPENCLIP = ("auto", "mean", "cls")
ONNX_NEEDS = ("onnxruntime", "onnxscript")


def refusal(config: Config, to: str) -> str | None:
    """Why a model of this configuration cannot be written in a format; None where it may be.

    What depends on the weights, such as a fitted offset, is found when they are there.
    """
    return _REFUSALS[to](config)


def advice(config: Config, to: str) -> str:
    """The formats besides `to` that do not refuse this configuration, as a message ends."""
    others = [other for other in _REFUSALS if other != to and refusal(config, other) is None]
    if others:
        return f"export to {' or '.join(others)}"
    needs_onnx = to != "onnx" and all(find_spec(name) is None for name in ONNX_NEEDS)
    return (
        "export to onnx, which needs pip install 'mmscale[onnx]'"
        if needs_onnx
        else ("no other format can express it either")
    )


def timm_parts(name: str) -> tuple[str, dict[str, Any]]:
    """Architecture and options of a tower that timm builds, whether by name or from a folder."""
    from mmscale.model.timm_vision import timm_config

    config = timm_config(name)
    if config is None:
        return name, {}
    return config["architecture"], config.get("model_args") or {}


def _open_clip(config: Config) -> str | None:
    model = config.model
    if is_whole_openclip(model):
        return None
    kind, _, name = str(model.vision.name).partition(":")
    if kind == "hf":
        return (
            f"model.vision.name={model.vision.name}: OpenCLIP's custom layout takes timm towers "
            "and its own transformers"
        )
    if model.vision.pooling != "auto":
        return f"model.vision.pooling={model.vision.pooling}: OpenCLIP keeps a tower's own pooling"
    if kind == "timm":
        options = {**timm_parts(name)[1], **model.vision.options}
        for option, value in options.items():
            if option not in TIMM_OPTIONS:
                return (
                    f"model.vision.options.{option}={value}: OpenCLIP builds timm towers without "
                    "this option"
                )
    text_is_hf = str(model.text.name).startswith("hf:")
    if text_is_hf and model.text.pooling not in POOLINGS_OF_OPENCLIP:
        return (
            f"model.text.pooling={model.text.pooling}: OpenCLIP pools Hugging Face towers by "
            "mean, cls or the model's own"
        )
    return _head(config, {"image": kind != "timm", "text": text_is_hf})


def _hf(config: Config) -> str | None:
    if is_whole_hf(config.model):
        return _own_projections(config)
    for part in ("vision", "text"):
        name = getattr(config.model, part).name
        if not str(name).startswith("hf:"):
            return (
                f"model.{part}.name={name}: a VisionTextDualEncoderModel takes Hugging Face towers"
            )
    if config.model.text.pooling != "auto":
        return (
            f"model.text.pooling={config.model.text.pooling}: a VisionTextDualEncoderModel takes "
            "the output of the tower's own pooler"
        )
    return _head(config, {"image": True, "text": True})


def _clip(config: Config) -> str | None:
    if is_whole_hf(config.model):
        return None
    named = f"model.vision.name={config.model.vision.name}"
    return f"{named}: --to clip writes a whole model of model.preset=hf:NAME"


def _own_projections(config: Config) -> str:
    return f"model.preset={config.model.preset} has projections of its own, not heads of ours"


def _onnx(config: Config) -> str | None:
    missing = next((name for name in ONNX_NEEDS if find_spec(name) is None), None)
    return missing and f"--to onnx needs {missing} (pip install 'mmscale[onnx]')"


def _sentence_transformers(config: Config) -> str | None:
    if find_spec("sentence_transformers") is None:
        return (
            "--to sentence_transformers needs sentence-transformers (pip install "
            "'mmscale[sentence-transformers]')"
        )
    model = config.model
    if is_whole_hf(model):
        return _own_projections(config)
    for part, sources in (("vision", ("hf:", "timm:")), ("text", ("hf:",))):
        tower = getattr(model, part)
        if not str(tower.name).startswith(sources):
            return (
                f"model.{part}.name={tower.name}: sentence-transformers takes towers of Hugging "
                "Face, and timm's for images"
            )
        if tower.pooling == "map" or (part == "vision" and tower.pooling != "auto"):
            return f"model.{part}.pooling={tower.pooling}: sentence-transformers cannot pool so"
    return _head(config, {"image": False, "text": False})


def _adapter(config: Config) -> str | None:
    if any(tower.adapter.kind != "none" for tower in (config.model.vision, config.model.text)):
        return None
    return "model.vision.adapter.kind and model.text.adapter.kind are none: no adapter was trained"


def _head(config: Config, without_offset: dict[str, bool]) -> str | None:
    """What a projection by one matrix, on some sides without an offset, cannot be."""
    for modality, no_offset in without_offset.items():
        side = config.model.head.of(modality)
        if setting := _bends(side):
            return f"the {modality} head is no linear map ({setting})"
        if no_offset and (setting := _shifts(side)):
            return f"the {modality} head adds an offset ({setting}), and the format's has none"
    return None


def _bends(head: HeadConfig) -> str | None:
    if head.kind in ("mlp", "projector"):
        return f"model.head.kind={head.kind}"
    return "model.head.unit_rms=true" if head.unit_rms else None


def _shifts(head: HeadConfig) -> str | None:
    if head.standardize:
        return f"model.head.standardize={head.standardize}"
    if head.kind == "identity":
        return None
    if head.bias:
        return "model.head.bias=true"
    return "model.head.batch_norm=true" if head.batch_norm else None


_REFUSALS: dict[str, Callable[[Config], str | None]] = {
    "open_clip": _open_clip,
    "hf": _hf,
    "onnx": _onnx,
    "sentence_transformers": _sentence_transformers,
    "adapter": _adapter,
    "clip": _clip,
}
FORMATS = tuple(_REFUSALS)
