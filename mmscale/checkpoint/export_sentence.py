"""To a folder that `sentence_transformers.SentenceTransformer` loads, for captions and pictures.

A router sends strings to the text tower and pictures to the image tower, each a transformers model
with its own preprocessing, its pooling and its head as a dense layer; unit rows come out.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TimmWrapperConfig, TimmWrapperModel

from mmscale.checkpoint.export import (
    Exported,
    InexpressibleError,
    linear_map,
    require_equal,
    timm_parts,
    write_json,
    write_tokenizer,
)
from mmscale.checkpoint.export_hf import processor

_TAKES = "sentence-transformers takes towers of Hugging Face, and timm's for images"
# The names that the library has for poolings.
_POOLINGS = {"cls": "cls", "mean": "mean", "eos": "lasttoken"}


def write_sentence_transformers(what: Exported, folder: Path) -> None:
    """Router, towers and heads by the library itself; loaded back and compared.

    Raises:
        ConfigError: The library cannot express a part of the model.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Router

    parts = folder / "parts"
    routes: dict[str, list[Any]] = {
        "text": _text(what, parts / "text"),
        "image": _image(what, parts / "image"),
    }
    mappings: Any = {(None, name): name for name in routes}
    router = Router(routes, default_route="text", route_mappings=mappings)
    model = SentenceTransformer(
        modules=[router, Normalize()], device="cpu", similarity_fn_name="cosine"
    )
    model.save(str(folder), create_model_card=False)
    shutil.rmtree(parts)
    _check(what, SentenceTransformer(str(folder), device="cpu"))


def _text(what: Exported, folder: Path) -> list[nn.Module]:
    tower: Any = what.encoder.model.text
    if not isinstance(tower.trunk, PreTrainedModel):
        raise InexpressibleError(f"model.text.name={what.config.model.text.name}: {_TAKES}")
    tower.trunk.save_pretrained(folder)
    write_tokenizer(what.spec, folder)
    words = {"max_seq_length": what.spec.context_length}
    return [*_tower(folder, "text", tower, tower.pooling, words), _dense(what, "text")]


def _image(what: Exported, folder: Path) -> list[nn.Module]:
    tower: Any = what.encoder.model.vision
    pooling = "model"
    if isinstance(tower.trunk, PreTrainedModel):
        tower.trunk.save_pretrained(folder)
        pixels, _ = what.sample()
        own = tower.trunk(pixel_values=pixels[:1])
        if tower.pooling is not None:
            pooling = tower.pooling.kind
        elif getattr(own, "pooler_output", None) is None:
            pooling = tower.unpooled.kind
    else:
        _timm(what).save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", processor(what))
    return [*_tower(folder, "image", tower, pooling, {}), _dense(what, "image")]


def _timm(what: Exported) -> TimmWrapperModel:
    """A timm model as transformers wraps it."""
    config, tower = what.config.model.vision, what.encoder.model.vision
    source, _, name = str(config.name).partition(":")
    if source != "timm":
        raise InexpressibleError(f"model.vision.name={config.name}: {_TAKES}")
    architecture, options = timm_parts(name)
    options = {**options, **config.options}
    for size in ({"img_size": what.spec.image_size}, {}):
        try:
            model = TimmWrapperModel(
                TimmWrapperConfig(architecture=architecture, model_args={**size, **options})
            )
        except TypeError:
            continue  # a convolutional model knows no size
        model.timm_model.load_state_dict(tower.trunk.state_dict())
        return model.eval()
    raise InexpressibleError(f"model.vision.name={config.name}: transformers cannot build it")


def _tower(
    folder: Path, modality: str, tower: Any, pooling: str, words: dict[str, Any]
) -> list[nn.Module]:
    """A transformers model and the pooling of its tokens; none where it pools by itself."""
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    if pooling == "model":
        output, name = "pooler_output", "sentence_embedding"
    elif pooling in _POOLINGS:
        output, name = "last_hidden_state", "token_embeddings"
    else:
        raise InexpressibleError(
            f"the {modality} tower's pooling={pooling}: sentence-transformers pools by "
            f"{', '.join(_POOLINGS)} or the model's own"
        )
    method: Any = {modality: {"method": "forward", "method_output_name": output}}
    model = Transformer(str(folder), modality_config=method, module_output_name=name, **words)
    if pooling == "model":
        return [model]
    mode: Any = _POOLINGS[pooling]
    return [model, Pooling(tower.width, pooling_mode=mode)]


def _dense(what: Exported, modality: str) -> nn.Module:
    from sentence_transformers.base.modules import Dense

    part = "vision" if modality == "image" else "text"
    model: Any = what.encoder.model
    width = model.get_submodule(part).width
    matrix, offset = linear_map(model.head[modality], width, f"the {modality} head")
    has_offset = bool(offset.abs().max() > 0)
    return Dense(
        width,
        len(matrix),
        bias=has_offset,
        activation_function=None,
        init_weight=matrix,
        init_bias=offset if has_offset else None,
    )


def _check(what: Exported, model: Any) -> None:
    pixels, tokens = what.sample()
    captions = ["a dog runs", "two children play in the deep snow"]
    image = model.eval()({"pixel_values": pixels, "modality": "image"})["sentence_embedding"]
    require_equal(what.encoder.encode_image(pixels), image, "the image tower")
    text = torch.from_numpy(model.encode(captions))
    require_equal(what.encoder.encode_text(tokens), text, "the text tower")
