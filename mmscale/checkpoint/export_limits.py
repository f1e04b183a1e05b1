"""What each format cannot express, by the configuration alone: told before a model is loaded."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from mmscale.config.model import HeadConfig
from mmscale.config.schema import Config
from mmscale.model.presets import is_whole_openclip

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


def _onnx(config: Config) -> str | None:
    missing = next((name for name in ONNX_NEEDS if find_spec(name) is None), None)
    return missing and f"--to onnx needs {missing} (pip install 'mmscale[onnx]')"


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
}
FORMATS = tuple(_REFUSALS)
