"""A model without its weights, to be counted: built on the meta device, without a hub."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, BertTokenizer, PretrainedConfig

from mmscale.config.model import ModelConfig, TowerConfig
from mmscale.contracts import InputSpec
from mmscale.errors import ConfigError
from mmscale.model.build import build_model
from mmscale.model.presets import fill_preset
from mmscale.model.registry import curated
from mmscale.model.two_tower import TwoTower

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def outline(config: ModelConfig, image_size: int | None) -> tuple[TwoTower, InputSpec]:
    """The model that `config` asks for; its spec cannot tokenise.

    Towers of Hugging Face that the registry describes are built from that description; any other
    is looked up as in training. A model whose forward or constructor needs values is built for
    real.

    Raises:
        ConfigError: A setting is wrong, or a tower's description cannot be had.
    """
    filled = fill_preset(config)
    with tempfile.TemporaryDirectory() as folder:
        towers = {
            part: _described(getattr(filled, part), part, Path(folder))
            for part in ("vision", "text")
        }
        model = filled.model_copy(update={"weights": "random", **towers})
        built: tuple[TwoTower, InputSpec] = without_weights(
            lambda: build_model(model, image_size, 0)
        )
        return built


def without_weights(build: Callable[[], Any]) -> Any:
    """What `build` builds, on the meta device; for real where that needs values."""
    try:
        with torch.device("meta"):
            return build()
    except (RuntimeError, NotImplementedError, ConfigError):
        return build()


def config_of(values: dict[str, Any]) -> PretrainedConfig:
    """A configuration of Hugging Face's from `curated.yaml`."""
    rest = {key: value for key, value in values.items() if key != "model_type"}
    return AutoConfig.for_model(values["model_type"], **rest)


def write_description(facts: dict[str, Any], folder: Path) -> PretrainedConfig:
    """Write a tower's files as `curated.yaml` describes them, weights and tokenizer excepted."""
    config = config_of(facts["config"])
    config.save_pretrained(folder)
    if "preprocessor" in facts:
        (folder / "preprocessor_config.json").write_text(json.dumps(facts["preprocessor"]))
    return config


def _described(tower: TowerConfig, part: str, folder: Path) -> TowerConfig:
    """The tower without weights; one that the registry describes as a folder of its own."""
    plain = tower.model_copy(update={"weights": "random"})
    facts = curated()[part].get(str(tower.name))
    if not facts or "config" not in facts:
        return plain
    path = folder / part
    config = write_description(facts, path)
    if part == "text":
        others = (f"word{number}" for number in range(config.vocab_size - len(WORDS)))
        (path / "vocab.txt").write_text("\n".join((*WORDS, *others)))
        BertTokenizer(vocab=str(path / "vocab.txt")).save_pretrained(path)
    return plain.model_copy(update={"name": f"hf:{path}"})
