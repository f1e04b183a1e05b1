"""Weight files: read without unpickling, loaded strictly, every mismatch named."""

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError  # noqa: TID251 - the error only, for `except`
from zipfile import BadZipFile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mmscale.errors import CheckpointError, ConfigError

SHOWN = 5
# What libraries raise at a weights file that is damaged, or holds more than weights.
UNREADABLE = (
    SafetensorError,
    UnpicklingError,
    BadZipFile,
    EOFError,
    RuntimeError,
    AttributeError,
    LookupError,
    TypeError,
    UnicodeDecodeError,
    struct.error,
)
WRAPPERS = ("state_dict", "model_state_dict", "model")


class MisfitError(CheckpointError):
    """Weights are of another architecture; `faults` says what is wrong with each tensor."""

    def __init__(self, faults: Sequence[str], origin: str):
        self.faults = faults
        super().__init__(
            f"{origin} does not fit the model in {len(faults)} tensors: "
            f"{'; '.join(faults[:SHOWN])}{'; ...' if len(faults) > SHOWN else ''}; "
            f"give the weights of this architecture, or options that match them."
        )


def read_weights(file: str, key: str) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or of a torch file that holds nothing but weights.

    Args:
        file: Path of the file.
        key: The setting that named it, such as `model.vision.weights`.

    Raises:
        ConfigError: There is no such file.
        CheckpointError: It cannot be read as weights.
    """
    path = Path(file)
    if not path.is_file():
        raise ConfigError(
            f"{key}={file} is neither `pretrained` nor `random`, and there is no such file: "
            f"give the path of a safetensors or torch weights file."
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{key}={file} is not a safetensors file nor a torch file of weights only; "
            f"save its state dict with safetensors."
        ) from error
    return _tensors(content, f"{key}={file}")


def first_line(error: Exception) -> str:
    """The beginning of a library's message: those about pickles go on for a page."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".:")


def load_strictly(
    module: nn.Module, tensors: Mapping[str, Tensor], origin: str, spare: Sequence[str] = ()
) -> None:
    """Fill every parameter and persistent buffer of `module`, casting to its dtype.

    Args:
        module: What to fill.
        tensors: By name.
        origin: Setting and file, for the message.
        spare: Prefixes of tensors that may be there though `module` has no use for them.

    Raises:
        CheckpointError: Names or shapes differ.
    """
    wanted = module.state_dict()
    missing = [f"{name} is missing" for name in wanted if name not in tensors]
    unexpected = [
        f"{name} is not a tensor of the model"
        for name in tensors
        if name not in wanted and not name.startswith(tuple(spare))
    ]
    misshapen = [
        f"{name} is {list(tensors[name].shape)} instead of {list(wanted[name].shape)}"
        for name in wanted
        if name in tensors and tensors[name].shape != wanted[name].shape
    ]
    refuse([*missing, *misshapen, *unexpected], origin)
    module.load_state_dict({name: tensors[name] for name in wanted})


def refuse(faults: Sequence[str], origin: str) -> None:
    """Raise MisfitError naming the first faults and their number, if there are any."""
    if faults:
        raise MisfitError(faults, origin)


def _tensors(content: object, origin: str) -> dict[str, Tensor]:
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(
            f"{origin} holds more than tensors by name; save its state dict alone."
        )
    return {name.removeprefix("module."): value for name, value in content.items()}
