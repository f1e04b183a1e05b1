"""When each setting has an effect: one that a user gives and nothing reads is refused.

`EFFECTS` holds every setting of the schema. A preset may leave a setting without effect, since what
is put over it may have taken its reader away; what a user writes may not.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from mmscale.config.data import ColumnsConfig
from mmscale.config.explain import in_yaml
from mmscale.config.model import HeadConfig
from mmscale.config.rules import (
    expanded_stages,
    is_evaluated,
    may_match,
    needs_momentum,
    places,
    teacher_terms,
    trained_terms,
    with_fusion_decided,
)
from mmscale.config.schema import Config

COMPONENTS = ("vision", "text", "head", "fusion", "scale")


@dataclass(frozen=True)
class Stretch:
    """A run, or one of its stages.

    Attributes:
        config: Its configuration.
        trained: Components that it trains some parameters of.
        patience: Whether the stage waits for an evaluation.
    """

    config: Config
    trained: frozenset[str]
    patience: bool = False


@dataclass(frozen=True)
class Effect:
    """Where a setting is read, if not everywhere.

    Attributes:
        where: In words, to follow "has an effect only ".
        holds: Whether it is read in a stretch.
    """

    where: str
    holds: Callable[[Stretch], bool]


def ineffective(
    config: Config, stages: list[Config], given: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """Path and sentence of each setting that was given and has no effect anywhere in the run.

    Args:
        config: The run's.
        stages: Of each stage; empty for a run without.
        given: What the user wrote, nested, as it stands in YAML.
    """
    stretches = list(_stretches(config, stages))
    said = settings_in(given)
    for path, effect in EFFECTS.items():
        if effect is None or path not in said:
            continue
        value = value_at(config, path)
        # Null turns something off, which may well be off already.
        if value is None or value == value_at(_defaults(), path):
            continue
        if not any(effect.holds(stretch) for stretch in stretches):
            yield path, _sentence(path, value, effect)
    for number, stage in enumerate(config.stages):
        if stage.patience is not None and not is_evaluated(config):
            path = f"stages.{number}.patience"
            yield path, _sentence(path, stage.patience, _EVALUATED)


def _sentence(path: str, value: Any, effect: Effect) -> str:
    return f"{path}={in_yaml(value)} has an effect only {effect.where}; make that so, or remove it"


def value_at(config: Config, path: str) -> Any:
    """The value of a setting."""
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


@cache
def _defaults() -> Config:
    return Config.model_validate({"data": {"train": "none"}})


def settings_in(given: Mapping[str, Any]) -> set[str]:
    """Every setting that nested settings say something about."""

    def holds(path: str) -> bool:
        value: Any = given
        for name in path.split("."):
            if not isinstance(value, Mapping) or name not in value:
                return False
            value = value[name]
        return True

    return {path for path in EFFECTS if holds(path)}


def _stretches(config: Config, stages: list[Config]) -> Iterator[Stretch]:
    if not stages:
        yield Stretch(config, _trained(config, ("*",)))
    for own, stage in zip(stages, expanded_stages(config), strict=True):
        yield Stretch(own, _trained(own, stage.train), stage.patience is not None)


def _trained(config: Config, patterns: tuple[str, ...]) -> frozenset[str]:
    model = with_fusion_decided(config).model
    there = {
        "vision": model.vision.frozen is not True,
        "text": model.text.frozen is not True,
        "head": True,
        "fusion": bool(model.fusion.enabled),
        "scale": (model.logit_scale.learn and model.logit_scale.course is None)
        or model.logit_scale.bias is not None,
    }
    return frozenset(
        name for name in COMPONENTS if there[name] and any(may_match(p, name) for p in patterns)
    )


def _any_head(config: Config, wanted: Callable[[HeadConfig], bool], side: str | None) -> bool:
    sides = ("image", "text") if side is None else (side,)
    return any(wanted(config.model.head.of(name)) for name in sides)


def _head(where: str, wanted: Callable[[HeadConfig], bool], side: str | None = None) -> Effect:
    who = "where a head" if side is None else f"where the {side}s' head"
    return Effect(f"{who} {where}", lambda s: _any_head(s.config, wanted, side))


def _has_layers(head: HeadConfig) -> bool:
    return head.kind != "identity"


def _is_deep(head: HeadConfig) -> bool:
    return head.kind in ("mlp", "projector")


def _heads(prefix: str, side: str | None = None) -> dict[str, Effect | None]:
    """Of the settings that a head, or one side's, may have."""
    layers = _head("has layers of its own (kind is not identity)", _has_layers, side)
    deep = _head("has hidden layers (kind is mlp or projector)", _is_deep, side)
    inverts = _head(
        "inverts a covariance (whiten, or init=cca)",
        lambda head: head.whiten != "none" or head.init == "cca",
        side,
    )
    return {
        f"{prefix}kind": None,
        f"{prefix}bias": layers,
        f"{prefix}batch_norm": layers,
        f"{prefix}hidden": deep,
        f"{prefix}layers": _head("is a projector", lambda head: head.kind == "projector", side),
        f"{prefix}activation": deep,
        f"{prefix}init": layers,
        f"{prefix}shrinkage": inverts,
        f"{prefix}dropout": None,
    }


def _always(prefix: str, *names: str) -> dict[str, Effect | None]:
    return dict.fromkeys((f"{prefix}{name}" for name in names), None)


def _trains(component: str) -> Effect:
    return Effect(f"where {component} is trained", lambda s: component in s.trained)


def _adapter(part: str) -> dict[str, Effect | None]:
    kind = f"model.{part}.adapter.kind"

    def there(stretch: Stretch) -> bool:
        return bool(getattr(stretch.config.model, part).adapter.kind != "none")

    details = dict.fromkeys(
        (f"model.{part}.adapter.{name}" for name in ("rank", "alpha", "dropout", "targets")),
        Effect(f"with an adapter ({kind})", there),
    )
    return {kind: _trains(part), **details}


_PROBED = Effect(
    "with held-out pairs (data.eval)", lambda stretch: stretch.config.data.eval is not None
)
_EVALUATED = Effect(
    "with held-out pairs (data.eval or eval.sets)", lambda stretch: is_evaluated(stretch.config)
)
_RETAINED = Effect("with retain.sets", lambda stretch: bool(stretch.config.retain.sets))
_PLATEAU = Effect(
    "with optim.schedule=plateau and held-out pairs (data.eval or eval.sets)",
    lambda s: s.config.optim.schedule == "plateau" and is_evaluated(s.config),
)
_METRIC = Effect(
    "with stop.patience, a stage's patience or optim.schedule=plateau, and data.eval or eval.sets",
    lambda s: (
        is_evaluated(s.config)
        and (
            s.config.stop.patience is not None or s.patience or s.config.optim.schedule == "plateau"
        )
    ),
)
_TABLE = Effect(
    "with data.hard_batches.table", lambda s: s.config.data.hard_batches.table is not None
)
_WINDOW = Effect(
    "with data.hard_batches.table or data.positive_share",
    lambda s: (
        s.config.data.hard_batches.table is not None or s.config.data.positive_share is not None
    ),
)
_GUARDED = Effect(
    "with a guard (guard.action is not off)", lambda s: s.config.guard.action != "off"
)
_QUEUE = Effect("with a queue (negatives.queue.size)", lambda s: s.config.negatives.queue.size != 0)
_MINING = Effect("with negatives.mining.kind", lambda s: s.config.negatives.mining.kind != "none")
_FUSION = Effect(
    "with fusion (model.fusion.enabled, or a term that needs it)",
    lambda s: bool(with_fusion_decided(s.config).model.fusion.enabled),
)
_WANDB = Effect("with log.wandb", lambda s: s.config.log.wandb != "off")
_FILED = Effect(
    "with log.wandb, log.trackio or log.mlflow",
    lambda s: {s.config.log.wandb, s.config.log.trackio, s.config.log.mlflow} != {"off"},
)
_PIPED = Effect(
    "where data.train names a pipe:COMMAND",
    lambda s: any(place.startswith("pipe:") for place in places(s.config.data.train)),
)
_TABLED = Effect(
    "where data.train, data.eval or eval.sets name a table, a folder or a Hub set",
    lambda s: any(
        not place.endswith((".tar", ".tar}")) and "://" not in place and place[:5] != "pipe:"
        for where in (
            s.config.data.train,
            s.config.data.eval or [],
            *(one.data for one in s.config.eval.sets.values()),
        )
        for place in places(where)
    ),
)
_CACHED = Effect(
    "with data.feature_cache, data.decoded_cache or a teacher's cache",
    lambda s: (
        s.config.data.feature_cache is not None
        or s.config.data.decoded_cache is not None
        or any(term.cache is not None for term in teacher_terms(s.config))
    ),
)
_BIASED = Effect(
    "with a term that adds it to logits (siglip)",
    lambda s: any(term.needs.logit_scale is not None for term in trained_terms(s.config)),
)

EFFECTS: dict[str, Effect | None] = {
    **_always("run.", "dir", "seed", "resume", "sync"),
    "run.overwrite": Effect(
        "with run.resume=never", lambda stretch: stretch.config.run.resume == "never"
    ),
    **_always("data.", "train", "mask", "eval", "resampled", "epoch_samples", "workers"),
    **_always("data.", "lanes", "shuffle_buffer", "captions", "caption_cleaning", "match"),
    **_always("data.", "positive_share", "image_size", "augment", "max_damaged"),
    **_always("data.", "feature_cache", "decoded_cache", "hard_batches.table"),
    **_always("data.keys.", "image", "text", "json", "lines"),
    "data.allow_pipe": _PIPED,
    "data.cache": _TABLED,
    "data.hold_out": _TABLED,
    **{f"data.columns.{use}": _TABLED for use in ColumnsConfig.model_fields},
    "data.hard_batches.by": _TABLE,
    "data.hard_batches.share": _TABLE,
    "data.hard_batches.window": _WINDOW,
    "data.crop_scale": Effect(
        "where images are cropped (data.augment is not none)",
        lambda s: s.config.data.augment != "none",
    ),
    "data.cache_gb": _CACHED,
    **_always("model.", "preset", "weights", "embed_dim"),
    **_always("model.vision.", "name", "weights", "options", "frozen", "width"),
    **_always("model.vision.", "pooling", "mean", "std"),
    **_always("model.text.", "name", "weights", "options", "frozen", "width"),
    **_always("model.text.", "pooling", "context_length"),
    **_adapter("vision"),
    **_adapter("text"),
    "model.vision.checkpointing": _trains("vision"),
    "model.text.checkpointing": _trains("text"),
    "model.head.weights": Effect(
        "where model.weights names a run, a checkpoint or an export",
        lambda s: s.config.model.weights not in ("random", "pretrained"),
    ),
    **_heads("model.head."),
    **_always("model.head.", "unit_rms", "standardize", "whiten"),
    "model.head.gain": _head(
        "has first weights to scale (kind is not identity, init not cca)",
        lambda head: _has_layers(head) and head.init != "cca",
    ),
    "model.head.fit_rows": _head(
        "is fitted (whiten, or init=pca, autoencoder or cca)",
        lambda head: head.whiten != "none" or head.init in ("pca", "autoencoder", "cca"),
    ),
    **_heads("model.head.image.", "image"),
    **_heads("model.head.text.", "text"),
    "model.fusion.enabled": None,
    **dict.fromkeys(
        (f"model.fusion.{name}" for name in ("dim", "layers", "heads", "classes")), _FUSION
    ),
    "model.momentum": Effect(
        "where a running mean of the weights is used (eval.weights=ema, a momentum queue, a term)",
        lambda s: needs_momentum(s.config),
    ),
    "model.logit_scale.init": Effect(
        "without model.logit_scale.course", lambda s: s.config.model.logit_scale.course is None
    ),
    **_always("model.logit_scale.", "max", "learn", "course", "by_data_size"),
    "model.logit_scale.bias": _BIASED,
    **_always("loss.", "preset", "terms"),
    "loss.precision": Effect(
        "with a term that contrasts rows with columns (loss.terms)",
        lambda s: any(term.contrasts_in(mined=False) for term in s.config.loss.terms),
    ),
    **_always("negatives.", "gather", "queue.size", "mining.kind"),
    "negatives.queue.source": _QUEUE,
    "negatives.queue.share": _QUEUE,
    "negatives.mining.share": _MINING,
    "negatives.mining.strength": _MINING,
    **_always("train.", "duration", "global_batch_size", "micro_batch_size"),
    **_always("train.non_finite.", "skips", "rollbacks"),
    **_always("optim.", "name", "options", "lr", "weight_decay", "betas", "eps", "warmup"),
    **_always("optim.", "clip_norm"),
    "optim.schedule": Effect(
        "as plateau with held-out pairs (data.eval or eval.sets)",
        lambda s: s.config.optim.schedule != "plateau" or is_evaluated(s.config),
    ),
    "optim.plateau.patience": _PLATEAU,
    "optim.plateau.factor": _PLATEAU,
    "optim.balance.band": Effect(
        "where both towers are trained", lambda s: {"vision", "text"} <= s.trained
    ),
    "optim.balance.every": Effect(
        "with optim.balance.band", lambda s: s.config.optim.balance.band is not None
    ),
    **{f"optim.lr_scale.{name}": _trains(name) for name in COMPONENTS},
    **{f"optim.layer_decay.{name}": _trains(name) for name in ("vision", "text")},
    **{f"optim.weight_decay_scale.{name}": _trains(name) for name in COMPONENTS[:-1]},
    "optim.weight_decay_scale.scale": Effect(
        "on weights that decay, and the logit scale never does", lambda stretch: False
    ),
    "stages": None,
    "stop.metric": _METRIC,
    "stop.patience": _EVALUATED,
    **_always("stop.", "above_chance", "rise"),
    **_always("engine.", "kind", "deepspeed", "precision", "device", "compile", "timeout"),
    "engine.reshard_after_forward": Effect(
        "without DeepSpeed",
        lambda s: s.config.engine.kind != "deepspeed" and s.config.engine.deepspeed is None,
    ),
    "eval.every": _EVALUATED,
    # The verbs read these of a finished run.
    **_always("eval.", "sets", "batch_size", "weights", "rerank"),
    "retain.sets": None,
    "retain.budget": _RETAINED,
    "retain.metric": Effect("with retain.budget", lambda s: s.config.retain.budget is not None),
    "probe.every": None,
    "probe.held_out": _PROBED,
    "guard.action": None,
    **dict.fromkeys((f"guard.{name}" for name in ("patience", "grace", "verdicts")), _GUARDED),
    **_always("checkpoint.", "every", "keep", "best", "failures"),
    "checkpoint.best_is": Effect(
        "with checkpoint.best", lambda s: s.config.checkpoint.best is not None
    ),
    **_always("log.", "every", "profile", "wandb", "tensorboard", "trackio", "mlflow", "page"),
    "log.wandb_project": _FILED,
    "log.wandb_images": _WANDB,
    "log.map": Effect("with log.page", lambda stretch: stretch.config.log.page),
}
