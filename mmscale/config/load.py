"""From command-line words to a frozen `Config`: files and presets, then `key=value`; later wins.

Torch is not imported on this way, so that a mistake is told at once.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from mmscale.config.effects import ineffective, settings_in
from mmscale.config.explain import explain, known_settings, meant_by
from mmscale.config.foreign import OPEN_CLIP_FLAGS
from mmscale.config.model import head_faults
from mmscale.config.paths import is_path, path_of
from mmscale.config.rules import (
    anchor_faults,
    data_faults,
    expanded_stages,
    figure_faults,
    fill_logit_scale,
    fusion_faults,
    is_evaluated,
    negatives_faults,
    objective_faults,
    retain_faults,
    set_faults,
    stage_faults,
    stage_settings,
    teacher_faults,
    width_faults,
)
from mmscale.config.schema import Config
from mmscale.config.values import infinite_faults
from mmscale.errors import ConfigError

PRESETS = Path(__file__).parent / "presets"
# What a trained model does not depend on: the machine that it runs on now.
_HOW_IT_RUNS = (
    "engine.device",
    "engine.precision",
    "eval.batch_size",
    "data.workers",
    "data.max_damaged",
)


def preset_names() -> list[str]:
    """Names of the shipped presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_config(words: Sequence[str | Mapping[str, Any]]) -> Config:
    """Read the words of a command line.

    Args:
        words: YAML paths or preset names, then `key=value`; a launcher's `--local_rank` is ignored.
            Of Python code also nested settings, where a file could stand.

    Raises:
        ConfigError: Every fault found, a line each.
    """
    words = [word for word in words if not _is_rank(word)]
    if not any(_is_whole(word) for word in words):
        raise ConfigError(
            "no configuration named: give a YAML file or one of the presets "
            f"{', '.join(preset_names())}, then key=value words"
        )
    config, unread = _read(words)
    if unread:
        raise ConfigError("\n".join(unread.values()))
    return config


def effective(words: Sequence[str]) -> tuple[str, ...]:
    """The words without each `key=value` that sets only what nothing reads.

    For whoever puts words together that nobody wrote as a whole: a sweep's trials, a study's rows.

    Raises:
        ConfigError: The words have other faults.
    """
    unread = _read(words)[1]

    def stays(word: str) -> bool:
        if _is_whole(word):
            return True
        paths = settings_in(_assigned(word))
        return not paths or not paths <= unread.keys()

    return tuple(word for word in words if stays(word))


def _is_rank(word: str | Mapping[str, Any]) -> bool:
    return isinstance(word, str) and word.startswith(("--local_rank", "--local-rank"))


def _is_whole(word: str | Mapping[str, Any]) -> bool:
    """Whether it is a configuration, not a setting of one."""
    return not isinstance(word, str) or "=" not in word or _is_file(Path(word))


def _read(words: Sequence[str | Mapping[str, Any]]) -> tuple[Config, dict[str, str]]:
    """The words' configuration; the settings without effect, with a sentence about each."""
    settings: dict[str, Any] = {}
    given: dict[str, Any] = {}
    for word in words:
        read = _read_word(word) if isinstance(word, str) else deepcopy(dict(word))
        _merge(settings, read)
        if not isinstance(word, str) or not _is_preset(word):
            _merge(given, deepcopy(read))
    config = validate(settings)
    stages = [stage_config(config, number) for number in range(len(expanded_stages(config)))]
    return config, dict(ineffective(config, stages, given))


def validate(settings: dict[str, Any]) -> Config:
    """A `Config` from nested settings.

    Raises:
        ConfigError: Every fault found, a line each.
    """
    if faults := list(infinite_faults(settings)):
        raise ConfigError("\n".join(faults))
    try:
        config = Config.model_validate(settings)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(error))) from error
    config = fill_logit_scale(config)
    if faults := [*stage_faults(config), *_faults_within(config)]:
        raise ConfigError("\n".join(faults))
    faults = [
        *_contradictions(config),
        *data_faults(config.data),
        *objective_faults(config),
        *head_faults(config.model.head),
        *fusion_faults(config),
        *negatives_faults(config),
        *width_faults(config),
        *set_faults(config),
        *figure_faults(config),
        *teacher_faults(config),
        *retain_faults(config),
    ]
    if faults:
        raise ConfigError("\n".join(faults))
    return config


def stage_config(config: Config, number: int) -> Config:
    """A run's configuration in one of its stages; without stages, the run's.

    Raises:
        ConfigError: The stage contradicts itself.
    """
    stages = expanded_stages(config)
    if not stages:
        return config
    stage = stages[number]
    try:
        return validate(stage_settings(config, stage))
    except ConfigError as error:
        lines = str(error).split("\n")
        raise ConfigError("\n".join(f"stage {stage.name!r}: {line}" for line in lines)) from error


def _faults_within(config: Config) -> Iterator[str]:
    """Faults of the stages' own settings, and of their order."""
    stages = []
    for number in range(len(expanded_stages(config))):
        try:
            stages.append(stage_config(config, number))
        except ConfigError as error:
            yield from str(error).split("\n")
    yield from anchor_faults(stages)


def with_words(config: Config, words: Sequence[str]) -> Config:
    """A configuration changed by `key=value` words.

    Raises:
        ConfigError: Every fault found, a line each.
    """
    settings = config.model_dump(mode="json")
    for word in words:
        _merge(settings, _read_word(word))
    return validate(settings)


def overridden(config: Config, words: Sequence[str]) -> Config:
    """The configuration of a trained run, told where its towers and data lie now.

    Args:
        config: As the run stored it.
        words: `key=value`: a path or name of a tower or of data, or what only decides how the model
            is run here.

    Raises:
        ConfigError: A word would make it another model, or is none.
    """
    settings = config.model_dump(mode="json")
    for word in words:
        key, equals, _ = word.partition("=")
        if not equals:
            raise ConfigError(f"{word}: not of the form key=value, as in model.text.name=hf:FOLDER")
        if key not in (allowed := _overridable()):
            raise ConfigError(
                f"{key} cannot be said anew of a trained model; what can is {', '.join(allowed)}"
            )
        _merge(settings, _assigned(word))
    return validate(settings)


def _overridable() -> list[str]:
    """Where things are, and how the model is run; the weights are those of the checkpoint."""
    places = [name for name, field in known_settings().items() if is_path(field)]
    kept = [name for name in places if not name.startswith(("run.", "engine."))]
    return [*(name for name in kept if not name.endswith(".weights")), *_HOW_IT_RUNS]


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
        flag = word.lstrip("-").partition("=")[0].replace("-", "_")
        meant = OPEN_CLIP_FLAGS[flag] if flag in OPEN_CLIP_FLAGS else meant_by(flag)
        example = f", here {meant}=VALUE" if meant else ""
        if flag in OPEN_CLIP_FLAGS:
            example += " (docs/from-open-clip.md)"
        raise ConfigError(f"{word}: no such option; settings are written key=value{example}")
    if word.startswith("~"):
        # A file; a word key=value may hold a home folder, but does not begin with one.
        word = path_of(word, word)
    path = Path(word)
    if _is_file(path):
        return read_yaml(path)
    if "=" in word:
        return _assigned(word)
    if word in preset_names():
        return read_yaml(PRESETS / f"{word}.yaml")
    close = difflib.get_close_matches(word, preset_names(), 1)
    hint = f"did you mean {close[0]}?" if close else "check the name"
    raise ConfigError(f"{word}: neither a file nor a preset ({', '.join(preset_names())}); {hint}")


def _assigned(word: str) -> dict[str, Any]:
    """Nested settings of a word `key=value`."""
    key, value = word.split("=", 1)
    nested: Any = parse_scalar(value)
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return dict(nested)


def _is_preset(word: str) -> bool:
    return not _is_file(Path(word)) and word in preset_names()


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        # A word may be longer than any path.
        return False


def _merge(into: dict[str, Any], update: dict[str, Any]) -> None:
    """Key by key; an empty mapping says that there is nothing, and takes what was there away."""
    for key, value in update.items():
        if isinstance(value, dict) and value and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _contradictions(config: Config) -> Iterator[str]:
    """Rules between settings that need neither the machine nor the data."""
    data, model, engine = config.data, config.model, config.engine
    if data.feature_cache is not None and not config.stages:
        if not (model.vision.frozen is True and model.text.frozen is True):
            yield (
                "data.feature_cache holds outputs of frozen towers, but a tower is trained; set "
                "model.vision.frozen=true model.text.frozen=true or data.feature_cache=null"
            )
        if data.augment != "none":
            yield (
                f"data.feature_cache with data.augment={data.augment} would freeze one random crop "
                "of each image; set data.augment=none"
            )
    if data.resampled and (
        data.match != "image" or data.positive_share is not None or data.hard_batches.table
    ):
        yield (
            "data.resampled reads shards without a manifest, which data.match, data.positive_share "
            "and data.hard_batches need; set data.resampled=false"
        )
    if engine.kind == "accelerate" and engine.deepspeed is not None:
        yield (
            f"engine.kind=accelerate contradicts engine.deepspeed={engine.deepspeed}; "
            "remove one of the two"
        )
    if config.checkpoint.best is not None and not is_evaluated(config):
        yield (
            f"checkpoint.best={config.checkpoint.best} is measured on held-out pairs, and there "
            "are none; set data.eval, or remove it"
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


class _CoreLoader(yaml.SafeLoader):
    """Safe loader with the 1.2 core scalars."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - the base class declares it so

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
):
    _CoreLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first
    )


def parse_scalar(text: str) -> Any:
    """The value of one `key=value` word; text that is not YAML stays text."""
    try:
        return yaml.load(text, Loader=_CoreLoader)
    except yaml.YAMLError:
        return text


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        ConfigError: Not readable, not YAML, or not a mapping.
    """
    try:
        content = yaml.load(path.read_text("utf-8"), Loader=_CoreLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); name a readable YAML file") from error
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" line {where.line + 1}" if where else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise ConfigError(f"{path}{line}: {problem}; mend the file") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: is nested too deep to be read; mend the file") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: holds {type(content).__name__}, must hold settings as key: value"
        )
    return content


def as_yaml(settings: dict[str, Any]) -> str:
    """Settings as `read_yaml` reads them back."""
    return str(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
