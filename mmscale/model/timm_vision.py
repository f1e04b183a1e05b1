"""Image towers of timm: `timm:NAME` as `timm.create_model` knows it, without its classifier."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import timm
import torch
from jaxtyping import Float
from timm.models import group_parameters, parse_model_name
from timm.models._hub import download_from_hf, load_cfg_from_json
from torch import Tensor, nn

from mmscale.config.model import VisionConfig
from mmscale.errors import CheckpointError, ConfigError
from mmscale.model.freezing import chain
from mmscale.model.hub import hub_call
from mmscale.model.inputs import ImageInput, agreed_size, at_size, triple
from mmscale.model.sources import constructing, did_you_mean
from mmscale.model.tower import Pooling, Tower, look
from mmscale.model.weights import UNREADABLE, first_line, load_strictly, read_weights, refuse

KEY = "model.vision"
HUB, LOCAL = ("hf-hub:", "hf_hub:"), "local-dir:"
_INDEXED = re.compile(r"\.\d+\.")
BRING = (
    "set model.vision.weights to a file of its weights, or to random to train it from scratch; "
    "or put the weights into the hub's local cache"
)


class TimmTower(Tower):
    """A timm model that ends in its own pooled features, or in another pooling of its tokens."""

    def __init__(self, trunk: Any, image_size: int, pooling: str = "auto"):
        super().__init__(trunk)
        show_features(trunk)
        self.pooling: Pooling | None = None
        row = torch.zeros(1, 3, image_size, image_size)
        look(self, row)
        prefix = getattr(trunk, "num_prefix_tokens", 0)
        if pooling == "cls" and not prefix:
            raise ConfigError(
                f"{KEY}.pooling=cls, but this tower has no CLS token; set it to auto, mean or map."
            )
        if pooling != "auto":
            self.pooling = Pooling(pooling, self.sequence_width, prefix)
            look(self, row)

    def forward_sequence(
        self, pixels: Float[Tensor, "b c h w"]
    ) -> tuple[Float[Tensor, "b f"], Float[Tensor, "b s e"]]:
        pooled, sequence = self.trunk(pixels)
        return pooled if self.pooling is None else self.pooling(sequence), sequence

    def checkpoint_blocks(self) -> bool:
        return checkpoint_timm(self.trunk)

    def block_parameters(self) -> list[list[str]]:
        return timm_blocks(self.trunk)


def show_features(trunk: Any) -> None:
    """Let a timm model return its tokens besides what it pools from them.

    Its own forward is replaced, because only calls of the model itself make sharded parameters
    whole.
    """
    trunk.forward = MethodType(_pooled_and_tokens, trunk)


def _pooled_and_tokens(trunk: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    features = trunk.forward_features(pixels)
    pooled = trunk.forward_head(features)
    if not isinstance(features, Tensor):
        return pooled, pooled[:, None]
    return pooled, as_sequence(features, getattr(trunk, "output_fmt", "NCHW"))


def as_sequence(features: Tensor, layout: str) -> Float[Tensor, "b s e"]:
    """Tokens as they are; the places of a map, row by row."""
    if features.ndim != 4:
        return features
    return features.flatten(1, 2) if layout == "NHWC" else features.flatten(2).transpose(1, 2)


def checkpoint_timm(trunk: Any) -> bool:
    """Switch timm's checkpointing on; False where the model has none."""
    try:
        trunk.set_grad_checkpointing(True)
    except (AssertionError, AttributeError, NotImplementedError):
        return False
    return True


def timm_blocks(trunk: Any) -> list[list[str]]:
    """As timm groups its layers; the input side first."""
    if not hasattr(trunk, "group_matcher"):
        return chain(trunk)
    found = group_parameters(trunk, trunk.group_matcher())
    groups = [list(found[index]) for index in sorted(found)]
    if len(groups) > 2 and not any(_INDEXED.search(name) for name in groups[-1]):
        ending = groups.pop()
        groups[-1] += ending
    return groups


def timm_config(name: str) -> dict[str, Any] | None:
    """`config.json` of a model in a folder or on the hub; None of one that timm brings itself."""
    if not name.startswith((*HUB, LOCAL)):
        return None
    what = f"{KEY}.name=timm:{name}"
    with hub_call(what, BRING, remote=name.startswith(HUB)):
        source, rest = parse_model_name(name)
        file = "config.json"
        path = Path(rest, file) if source == "local-dir" else download_from_hf(rest, file)
        return dict(load_cfg_from_json(path))


def build_timm_vision(
    name: str, config: VisionConfig, image_size: int | None
) -> tuple[Tower, ImageInput]:
    """`timm:NAME` with weights through timm's own hub code, from a file, or random."""
    if not timm.is_model(name) and not name.startswith((*HUB, LOCAL)):
        raise ConfigError(
            f"model.vision.name=timm:{name} is not a model of timm {timm.__version__}"
            f"{did_you_mean(name.split('.')[0], timm.list_models())}."
        )
    options = dict(config.options)
    if "checkpoint_path" in options:
        raise ConfigError(
            f"{KEY}.options.checkpoint_path={options['checkpoint_path']} would be read without a "
            f"check of what it holds; set {KEY}.weights to that file."
        )
    size = agreed_size(image_size, options, "img_size")
    trunk = _create(name, options, size, pretrained=config.weights == "pretrained")
    facts = trunk.pretrained_cfg
    if config.weights not in ("pretrained", "random"):
        origin = f"{KEY}.weights={config.weights}"
        tensors = read_weights(config.weights, f"{KEY}.weights")
        with at_size(size, facts["input_size"][-1], f"timm:{name}"):
            load_strictly(trunk, tensors, origin, spare=_classifiers(facts))
    pixels = ImageInput(
        image_size=size or facts["input_size"][-1],
        mean=triple(facts["mean"]),
        std=triple(facts["std"]),
        interpolation="bilinear" if facts["interpolation"] == "bilinear" else "bicubic",
    )
    with constructing(KEY, f"timm:{name} at {pixels.image_size} pixels"):
        return TimmTower(trunk, pixels.image_size, config.pooling), pixels


def _create(name: str, options: Mapping[str, Any], image_size: int | None, pretrained: bool) -> Any:
    """The model, told the image size if its constructor takes one; convolutional ones do not."""
    start = torch.get_rng_state()
    if image_size and "img_size" not in options:
        try:
            return _create(name, {**options, "img_size": image_size}, None, pretrained)
        except ConfigError as error:
            if f"{KEY}.options.img_size" not in str(error):
                raise
            torch.set_rng_state(start)
    random = _create_random(name, options)
    if not pretrained:
        return random
    torch.set_rng_state(start)
    what = f"{KEY}.name=timm:{name} with pretrained weights"
    local = name.startswith(LOCAL)
    with hub_call(what, BRING, remote=not local):
        try:
            loaded = timm.create_model(name, pretrained=True, num_classes=0, **options)
        except UNREADABLE as error:
            if not local:
                raise
            raise CheckpointError(
                f"{what}: they cannot be read into the model ({first_line(error)}); fetch them "
                f"again, or save them as safetensors."
            ) from error
    untouched = _untouched(random, loaded, partial(_create_random, name, options))
    refuse(
        [f"{tensor} is missing" for tensor in untouched], f"the pretrained weights of timm:{name}"
    )
    return loaded


def _create_random(name: str, options: Mapping[str, Any]) -> nn.Module:
    what = f"{KEY}.name=timm:{name}"
    with hub_call(what, BRING, remote=name.startswith(HUB)), constructing(KEY, f"timm:{name}"):
        return timm.create_model(name, pretrained=False, num_classes=0, **options)


def _untouched(random: nn.Module, loaded: nn.Module, another: Callable[[], nn.Module]) -> list[str]:
    """Tensors of `loaded` that still hold the random start that `random`, of the same seed, has.

    Without its classifier timm loads non-strictly: a block that the file lacks would stay random.
    `another` builds the model from other random numbers; what is equal there was never random.
    """
    start = random.state_dict()
    same = [name for name, value in loaded.state_dict().items() if torch.equal(value, start[name])]
    other = another().state_dict() if same else start
    return [name for name in same if not torch.equal(other[name], start[name])]


def _classifiers(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Prefixes of the classifier's tensors, which a tower has no use for."""
    names = facts.get("classifier") or ()
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
