"""A model on held-out pairs, while it trains and from its checkpoint; `mmscale.load`."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from mmscale.checkpoint.files import Checkpoint
from mmscale.checkpoint.resume import open_trained
from mmscale.config.load import overridden, stage_config
from mmscale.config.model import ModelConfig
from mmscale.config.paths import path_of
from mmscale.config.rules import matryoshka_widths
from mmscale.config.schema import Config
from mmscale.contracts import InputSpec, Peers
from mmscale.data.caption_text import with_cleaning
from mmscale.data.features import FeatureTable
from mmscale.data.pixels import EvalTransform, in_rgb, normalise
from mmscale.data.shards import ShardSet
from mmscale.diagnostics.pairs import Pairs, Sources
from mmscale.diagnostics.retrieval import RECALLS, recalls, reranked_recalls, shortlists
from mmscale.encoding import HeldOut
from mmscale.engine.ema import averaged
from mmscale.engine.encode import Call, Encoder, encode
from mmscale.engine.inference import Inference
from mmscale.engine.rerank import match_scores
from mmscale.errors import HaltError, printable
from mmscale.model.build import build_model
from mmscale.model.dual_encoder import DualEncoder, Tokenizer
from mmscale.model.freezing import select
from mmscale.model.hub import fetching_only
from mmscale.model.kept import kept_towers, opened_lines
from mmscale.model.two_tower import TwoTower
from mmscale.parallel.device import choose


@dataclass(frozen=True)
class Trained:
    """A trained model, ready to be called by one process."""

    config: Config
    model: TwoTower
    spec: InputSpec
    inference: Inference
    checkpoint: Checkpoint


def load_trained(
    path: Path, words: Sequence[str] = (), check: Callable[[Config], None] | None = None
) -> Trained:
    """The model of a run or checkpoint.

    Args:
        path: The run or checkpoint.
        words: `key=value`: where what it names lies now (`config.load.overridden`).
        check: Refuses a configuration before its model is built.

    Raises:
        CheckpointError: Neither, or damaged.
        ConfigError: A word would make it another model.
    """
    checkpoint = open_trained(path)
    run, stage = overridden(checkpoint.config, words), checkpoint.state.stage
    config = stage_config(run, stage)
    config = config.model_copy(update={"model": _kept(checkpoint, config.model)})
    if check is not None:
        check(config)
    named = {str(config.model.vision.name), str(config.model.text.name)}
    with fetching_only(named - _names(checkpoint.config.model)):
        model, spec = build_model(config.model, config.data.image_size, config.run.seed, fill=False)
    select(model, run, stage)
    spec = with_cleaning(spec, config.data.caption_cleaning)
    checkpoint.load_weights(model)
    if config.eval.weights == "ema":
        checkpoint.load_momentum(averaged(model, model))
    return Trained(config, model, spec, Inference(model, choose(config.engine)), checkpoint)


def _kept(checkpoint: Checkpoint, model: ModelConfig) -> ModelConfig:
    """The model, its towers read from the checkpoint as far as that keeps them."""
    stored = checkpoint.config.model
    kept = kept_towers(model, stored, checkpoint.folder, checkpoint.files)
    for line in opened_lines(model, stored, kept):
        sys.stderr.write(f"mmscale: {printable(line)}\n")
    return kept


def _names(model: ModelConfig) -> set[str]:
    return {str(model.vision.name), str(model.text.name)}


def embed_set(trained: Trained, shards: ShardSet, peers: Peers) -> Pairs:
    """A set through a trained model."""
    call, device = trained.inference.call, trained.inference.device
    encoder = Encoder.of(trained.config, call, device, trained.spec, peers)
    return embed(call, device, encode(encoder, shards))


def evaluate_set(trained: Trained, shards: ShardSet, peers: Peers) -> dict[str, float]:
    """What `evaluate` finds, of a trained model on a set."""
    call, device = trained.inference.call, trained.inference.device
    encoder = Encoder.of(trained.config, call, device, trained.spec, peers)
    table = encode(encoder, shards)
    return _figures(trained.config, encoder, shards, table, embed(call, device, table))


def evaluate(
    config: Config,
    call: Call,
    device: torch.device,
    held_out: HeldOut,
    peers: Peers,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, float], Pairs]:
    """Recall on held-out pairs, named as it is logged, and their embeddings. Collective.

    Args:
        config: The run.
        call: Forward of a model in evaluation mode.
        device: Where it computes.
        held_out: The pairs.
        peers: All ranks.
        progress: Called as images are encoded, with how many and of how many.

    Raises:
        HaltError: The embeddings are not finite.
    """
    encoder = Encoder.of(config, call, device, held_out.spec, peers)
    table = held_out.table
    if table is None:
        table = encode(encoder, held_out.shards, progress)
    pairs = embed(call, device, table)
    require_sound_model(pairs, cached=held_out.table is not None)
    figures = _figures(config, encoder, held_out.shards, table, pairs)
    named = {f"eval/{name}": value for name, value in figures.items()}
    return named | {"eval/mean": fmean(figures[name] for name in RECALLS)}, pairs


def require_sound_model(pairs: Pairs, cached: bool) -> None:
    """Refuse what a model in training gives once its weights, or its activations, are broken.

    Args:
        pairs: What it gives.
        cached: The towers' outputs come from a cache: what is not finite there is the data's fault,
            and told where the pairs are compared.

    Raises:
        HaltError: The embeddings are not finite.
    """
    given = (pairs.backbone_image, pairs.backbone_text) if cached else ()
    if _are_finite(pairs.image, pairs.text) or not _are_finite(*given):
        return
    raise HaltError(
        "the model's embeddings of the held-out pairs are not finite: its weights have overflowed, "
        "or what it computes from them in this precision; go on from the checkpoint before with a "
        "lower optim.lr or optim.clip_norm"
    )


def _are_finite(*rows: Tensor | None) -> bool:
    return all(side is None or bool(side.isfinite().all()) for side in rows)


def embed(call: Call, device: torch.device, table: FeatureTable) -> Pairs:
    """Tower outputs through the heads: the pairs that are evaluated. Collective under ZeRO-3."""
    good, captions = table.good, table.good.repeat_interleave(table.first.diff())
    places = good.nonzero()[:, 0]
    sources = Sources(
        places,
        [table.keys[place] for place in places.tolist()],
        [table.captions[row] for row in captions.nonzero()[:, 0].tolist()],
    )
    with torch.no_grad():
        image, text, scale, _ = call(
            "heads", table.image[good].to(device), table.text[captions].to(device)
        )
    return Pairs(
        image=image.unit.float().cpu(),
        text=text.unit.float().cpu(),
        image_ids=table.image_ids[good],
        text_ids=table.text_ids()[captions],
        backbone_image=table.image[good],
        backbone_text=table.text[captions],
        logit_scale=float(scale),
        sources=sources,
    )


def _figures(
    config: Config, encoder: Encoder, shards: ShardSet, table: FeatureTable, pairs: Pairs
) -> dict[str, float]:
    """Recall of the dual encoder, at each width, and after re-ranking by fusion. Collective."""
    figures: dict[str, float] = dict(recalls(pairs, encoder.peers))
    for width in matryoshka_widths(config):
        at_width = recalls(pairs.cut(width), encoder.peers)
        figures |= {f"{name}@{width}": at_width[name] for name in RECALLS}
    if config.eval.rerank:
        lists = shortlists(pairs, config.eval.rerank)
        scores = match_scores(encoder, shards, table, lists.wanted())
        figures |= reranked_recalls(pairs, lists, scores)
    return figures


def load(
    path: str | Path, *words: str
) -> tuple[DualEncoder, Callable[[Image.Image], Tensor], Tokenizer]:
    """The model of a run or checkpoint on its device, its evaluation transform and tokenizer.

    Args:
        path: The run or checkpoint.
        words: `key=value`, where a tower that the run names lies elsewhere now:
            `model.text.name=hf:FOLDER`, or where it shall run: `engine.device=cpu`.

    Raises:
        CheckpointError: Neither, or damaged.
        ConfigError: A word would make it another model.
    """
    trained = load_trained(Path(path_of(str(path), str(path))), words)
    model = DualEncoder(trained.model, trained.spec.pad_token)
    return model, Transform(trained.spec), Tokenizer(trained.spec)


def load_on_cpu(
    path: Path, words: Sequence[str] = (), check: Callable[[Config], None] | None = None
) -> tuple[Config, DualEncoder, InputSpec]:
    """The model of a run or checkpoint in fp32, with the run's configuration; as `load_trained`.

    Raises:
        CheckpointError: Neither, or damaged.
        ConfigError: A word would make it another model.
    """
    trained = load_trained(path, words, check)
    return (
        trained.config,
        DualEncoder(trained.model.cpu().float(), trained.spec.pad_token),
        trained.spec,
    )


class Transform:
    """A photograph to the pixels that the model was evaluated with."""

    def __init__(self, spec: InputSpec):
        self._spec = spec
        self._crop = EvalTransform(spec)

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 h w"]:
        """Its pixels, normalised.

        Raises:
            DataError: Its mode says nothing of its range.
        """
        upright = in_rgb(ImageOps.exif_transpose(image))
        pixels = torch.from_numpy(np.array(upright)).permute(2, 0, 1)
        return normalise(self._crop(pixels)[None], self._spec)[0]
