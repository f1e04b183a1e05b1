"""What a checkpoint keeps of its towers, so that it needs no folder and no hub to be used.

Configurations and tokenizers as they lay where the run read them: no weights, which are the
checkpoint's own, and no code. They are read back as any other model's folder, by the same code.
"""

import json
from collections.abc import Collection, Iterator
from pathlib import Path

from mmscale.config.model import ModelConfig, TowerConfig
from mmscale.model.presets import fill_preset, is_whole

PARTS = ("vision", "text")
_OPENCLIP_CONFIG = "open_clip_config.json"


def tower_files(model: ModelConfig) -> dict[str, bytes]:
    """The files of the towers that the installed libraries do not bring, by name in a checkpoint.

    Args:
        model: As the run was built from; its preset is filled here if it is not yet.
    """
    model = _filled(model)
    parts = PARTS[:1] if is_whole(model) else PARTS
    return {
        f"{part}/{name}": content
        for part in parts
        for name, content in _files_of(
            getattr(model, part), part, model.weights, part == "text" or is_whole(model)
        )
    }


def kept_towers(
    model: ModelConfig, stored: ModelConfig, folder: Path, files: Collection[str]
) -> ModelConfig:
    """The same model, built from what a checkpoint keeps of its towers, as far as it does.

    Args:
        model: Wanted; a tower that it names otherwise than the checkpoint is left as it is.
        stored: As the checkpoint names it.
        folder: Of the checkpoint.
        files: What it holds besides tensors; their digests were compared.
    """
    filled, stored = _filled(model), _filled(stored)
    names = {
        part: _kept_name(getattr(filled, part), part, folder, files)
        if getattr(filled, part).name == getattr(stored, part).name
        else getattr(filled, part).name
        for part in PARTS
    }
    if is_whole(filled):
        names = dict.fromkeys(PARTS, names["vision"])
        filled = filled.model_copy(update={"preset": names["vision"]})
    towers = {
        part: getattr(filled, part).model_copy(update={"name": name})
        for part, name in names.items()
    }
    return filled.model_copy(update=towers)


def opened_lines(model: ModelConfig, stored: ModelConfig, kept: ModelConfig) -> list[str]:
    """What to tell of folders and names outside a checkpoint that its own words have opened.

    Args:
        model: Wanted; what it names otherwise than the checkpoint are the user's words.
        stored: As the checkpoint names it.
        kept: What `kept_towers` made of it.
    """
    return [
        f"model.{part}.name={name} is named by the checkpoint, which does not keep it: it is read "
        f"from this machine, and nothing is fetched; give model.{part}.name to choose another"
        for part in PARTS
        if (name := getattr(kept, part).name) == getattr(_filled(stored), part).name
        and getattr(_filled(model), part).name == name
        and _lies_outside(str(name))
    ]


def _filled(model: ModelConfig) -> ModelConfig:
    """With the preset's towers; of a model whose towers are named nothing is opened for that."""
    return model if model.vision.name and model.text.name else fill_preset(model)


def _lies_outside(name: str) -> bool:
    source, _, rest = name.partition(":")
    return source == "hf" or rest.startswith(("hf-hub:", "hf_hub:", "local-dir:"))


def _kept_name(tower: TowerConfig, part: str, folder: Path, files: Collection[str]) -> str | None:
    """Where the checkpoint keeps the tower; its own name where it keeps nothing of it."""
    source, _, _ = str(tower.name).partition(":")
    first = _OPENCLIP_CONFIG if source == "openclip" else "config.json"
    if f"{part}/{first}" not in files:
        return tower.name
    scheme = {"hf": "hf:", "timm": "timm:local-dir:", "openclip": "openclip:local-dir:"}[source]
    return f"{scheme}{folder.resolve() / part}"


def _files_of(
    tower: TowerConfig, part: str, weights: str, has_text: bool
) -> Iterator[tuple[str, bytes]]:
    # Each library is imported for its own towers only.
    source, _, name = str(tower.name).partition(":")
    if source == "timm":
        from mmscale.model.timm_vision import timm_config

        if (config := timm_config(name)) is not None:
            yield "config.json", _json(config)
    elif source == "openclip":
        from mmscale.model.openclip_folder import openclip_files

        for file, content in openclip_files(name, weights):
            yield file, content if isinstance(content, bytes) else _json(content)
    else:
        from mmscale.model.hf_models import model_folder, read_config, small_files

        folder = model_folder(name, f"model.{part}")
        # What cannot be had is told as where the tower is built, which comes after this.
        read_config(folder, f"model.{part}")
        yield from small_files(folder, has_text)


def _json(content: object) -> bytes:
    return json.dumps(content, indent=1).encode()
