"""From command-line words to a frozen `Config`: files and presets, then `key=value`; later wins.

Torch is not imported on this way, so that a mistake is told at once.
"""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from mmscale.config.schema import Config
from mmscale.config.yaml import parse_scalar, read_yaml
from mmscale.errors import ConfigError

PRESETS = Path(__file__).parent / "presets"
# Names that users bring from other trainers, and the setting that they mean here.
FOREIGN_NAMES = {
    "epochs": "train.duration",
    "num_epochs": "train.duration",
    "max_steps": "train.duration",
    "steps": "train.duration",
    "batchsize": "train.global_batch_size",
    "batch_size": "train.global_batch_size",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "accum_freq": "train.micro_batch_size",
    "learning_rate": "optim.lr",
    "wd": "optim.weight_decay",
    "grad_clip_norm": "optim.clip_norm",
    "num_workers": "data.workers",
    "train_data": "data.train",
    "val_data": "data.eval",
    "temperature": "model.logit_scale.init",
    "output_dir": "run.dir",
    "resume_from_checkpoint": "run.resume",
}


def preset_names() -> list[str]:
    """Names of the shipped presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_config(words: Sequence[str]) -> Config:
    """Read the words of a command line.

    Args:
        words: YAML paths or preset names, then `key=value`; a launcher's `--local_rank` is ignored.

    Raises:
        ConfigError: Every fault found, a line each.
    """
    words = [word for word in words if not word.startswith(("--local_rank", "--local-rank"))]
    if not any("=" not in word or Path(word).is_file() for word in words):
        raise ConfigError(
            "no configuration named: give a YAML file or one of the presets "
            f"{', '.join(preset_names())}, then key=value words"
        )
    settings: dict[str, Any] = {}
    for word in words:
        _merge(settings, _read_word(word))
    return validate(settings)


def validate(settings: dict[str, Any]) -> Config:
    """A `Config` from nested settings.

    Raises:
        ConfigError: Every fault found, a line each.
    """
    try:
        config = Config.model_validate(settings)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(error))) from error
    faults = list(_contradictions(config))
    if faults:
        raise ConfigError("\n".join(faults))
    return config


def flatten(section: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Dotted path -> value of every setting."""
    flat: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _read_word(word: str) -> dict[str, Any]:
    if word.startswith("-"):
        raise ConfigError(f"{word}: train.py takes no flags; write settings as key=value")
    path = Path(word)
    if path.is_file():
        return read_yaml(path)
    if "=" in word:
        key, value = word.split("=", 1)
        nested: Any = parse_scalar(value)
        for part in reversed(key.split(".")):
            nested = {part: nested}
        return dict(nested)
    if word in preset_names():
        return read_yaml(PRESETS / f"{word}.yaml")
    close = difflib.get_close_matches(word, preset_names(), 1)
    hint = f"did you mean {close[0]}?" if close else "check the name"
    raise ConfigError(f"{word}: neither a file nor a preset ({', '.join(preset_names())}); {hint}")


def _merge(into: dict[str, Any], update: dict[str, Any]) -> None:
    for key, value in update.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _paths(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        yield prefix + name, field
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from _paths(annotation, f"{prefix}{name}.")


def _explain(error: ValidationError) -> list[str]:
    """One sentence for each setting at fault, its unions' alternatives put together."""
    known = dict(_paths(Config))
    rules: dict[str, tuple[Any, list[str]]] = {}
    for fault in error.errors():
        parts = [str(part) for part in fault["loc"]]
        if fault["type"] == "extra_forbidden":
            value = fault["input"]
            # `trian.duration=...` fails at `trian`; the whole path has the better neighbour.
            while isinstance(value, dict) and len(value) == 1:
                ((name, value),) = value.items()
                parts.append(str(name))
            rules[".".join(parts)] = (value, ["unknown"])
            continue
        length = max((n for n in range(len(parts) + 1) if ".".join(parts[:n]) in known), default=0)
        tail = [part for part in parts[length:] if part.isdigit()]
        path = ".".join(parts[:length] + tail) or ".".join(parts)
        rules.setdefault(path, (fault["input"], []))[1].append(_rule(fault))
    return [_sentence(path, value, found, known) for path, (value, found) in rules.items()]


def _rule(fault: Any) -> str:
    kind, context = fault["type"], fault.get("ctx", {})
    fixed = {
        "float_parsing": "a number, like 3e-4",
        "float_type": "a number, like 3e-4",
        "int_parsing": "a whole number",
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "bool_parsing": "true or false",
        "bool_type": "true or false",
        "string_type": "text",
        "none_required": "null",
        "missing": "missing",
    }
    if kind in fixed:
        return fixed[kind]
    if kind == "literal_error":
        return str(context["expected"])
    if kind == "value_error":
        return str(context["error"]).removeprefix("must be ")
    return str(fault["msg"]).removeprefix("Input should be ").lower()


def _sentence(path: str, value: Any, rules: list[str], known: dict[str, Any]) -> str:
    if rules == ["unknown"]:
        return _unknown(path, value, known)
    doc = getattr(known.get(path), "description", None) or ""
    about = f" ({doc.rstrip('.').replace(chr(10), ' ')})" if doc else ""
    if "missing" in rules:
        return f"{path} is not set: it has no default{about}; add {path}=VALUE"
    wanted = " or ".join(dict.fromkeys(rules))
    example = f"write for example {path}={_example(path, known)}"
    return f"{path}={value!r} must be {wanted}{about}; {example}"


def _example(path: str, known: dict[str, Any]) -> str:
    field = known.get(path)
    default = getattr(field, "default", None)
    choices = [arg for arg in get_args(getattr(field, "annotation", None)) if isinstance(arg, str)]
    if isinstance(default, (int, float, str)) and not isinstance(default, bool):
        return str(default)
    text = str(default)
    return f"'{text}'" if " " in text and "=" not in text else choices[0] if choices else "VALUE"


def _unknown(path: str, value: Any, known: dict[str, Any]) -> str:
    leaf = path.rsplit(".", 1)[-1]
    meant = FOREIGN_NAMES.get(leaf.lower())
    if meant is None:
        leaves = {name.rsplit(".", 1)[-1]: name for name in known}
        close = difflib.get_close_matches(path, known, 1, 0.75)
        near = difflib.get_close_matches(leaf, leaves, 1, 0.75)
        meant = close[0] if close else leaves[near[0]] if near else None
    if meant is None:
        return f"{path} is not a setting; remove it (docs/settings.md lists them all)"
    if meant == "train.duration" and isinstance(value, (int, float)):
        unit = "steps" if "step" in leaf.lower() else "epochs"
        return f"{path} is not a setting; did you mean train.duration='{value} {unit}'?"
    return f"{path} is not a setting; did you mean {meant}?"


def _contradictions(config: Config) -> Iterator[str]:
    """Rules between settings that need neither the machine nor the data."""
    data, model, engine = config.data, config.model, config.engine
    if data.feature_cache is not None:
        if not (model.vision.frozen and model.text.frozen):
            yield (
                "data.feature_cache holds outputs of frozen towers, but a tower is trained; set "
                "model.vision.frozen=true model.text.frozen=true or data.feature_cache=null"
            )
        if data.augment != "none":
            yield (
                f"data.feature_cache with data.augment={data.augment} would freeze one random crop "
                "of each image; set data.augment=none"
            )
    if engine.kind == "accelerate" and engine.deepspeed is not None:
        yield (
            f"engine.kind=accelerate contradicts engine.deepspeed={engine.deepspeed}; "
            "remove one of the two"
        )
    low, high = data.crop_scale
    if not 0 < low <= high <= 1:
        yield f"data.crop_scale={low},{high} must rise within (0, 1]; write for example [0.9, 1.0]"
    micro = config.train.micro_batch_size
    if micro != "auto" and micro > config.train.global_batch_size:
        yield (
            f"train.micro_batch_size={micro} is larger than train.global_batch_size="
            f"{config.train.global_batch_size}; lower it"
        )
