"""DeepSpeed's JSON: ZeRO and communication choices come from the file, all else from the run.

A number in the file that the run config also decides must agree with it or be `"auto"`.
"""

import json
from pathlib import Path
from typing import Any

from mmscale.errors import ConfigError

# In a checkout a link to the folder at its top; in a wheel the files themselves.
SHIPPED = Path(__file__).with_name("ds_configs")
# What DeepSpeed's own launcher gets when no file is named.
DEFAULT = "zero1"


def read_deepspeed(name: str | None) -> dict[str, Any]:
    """The file's settings.

    Args:
        name: A file, or one of those that come with mmscale: `zero2`, or `ds_configs/zero2.json`
            in any working folder; None: `zero1`.

    Raises:
        ConfigError: No such file, not JSON, or a stage that is not 1, 2 or 3.
    """
    name = name or DEFAULT
    shipped = {file.stem: file for file in sorted(SHIPPED.glob("*.json"))}
    path = Path(name)
    if not path.is_file():
        known = shipped.get(name.removeprefix("ds_configs/").removesuffix(".json"))
        if known is None:
            raise ConfigError(
                f"engine.deepspeed={name}: no such file here, and none of those that come with "
                f"mmscale ({', '.join(shipped)}); name one of them or a file"
            )
        path = known
    try:
        settings = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"engine.deepspeed={path}: not JSON ({error}); mend the file") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"engine.deepspeed={path}: must hold a JSON object of settings")
    stage = settings.get("zero_optimization", {}).get("stage")
    if stage not in (1, 2, 3):
        raise ConfigError(
            f"engine.deepspeed={path}: zero_optimization.stage={stage} must be 1, 2 or 3; without "
            "ZeRO use engine.kind=accelerate"
        )
    return settings


def zero_stage(name: str | None) -> int:
    """The ZeRO stage of a file, 1, 2 or 3."""
    return int(read_deepspeed(name)["zero_optimization"]["stage"])


def fill(settings: dict[str, Any], decided: dict[str, Any], name: str | None) -> dict[str, Any]:
    """Put the run's values where the file leaves them open.

    Args:
        settings: What the file says.
        decided: Dotted DeepSpeed key -> the run config's value.
        name: The file, for messages.

    Raises:
        ConfigError: Both say something and they differ.
    """
    filled: dict[str, Any] = json.loads(json.dumps(settings))
    for dotted, value in decided.items():
        *sections, leaf = dotted.split(".")
        place = filled
        for section in sections:
            place = place.setdefault(section, {})
        given = place.get(leaf, "auto")
        if given not in ("auto", value):
            raise ConfigError(
                f"engine.deepspeed={name}: {dotted}={given} contradicts the run's {value}; "
                f'write "auto" in the file'
            )
        place[leaf] = value
    return filled
