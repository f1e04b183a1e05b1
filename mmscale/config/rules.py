"""Rules between settings: what terms, data and stages need of the rest of the configuration."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from mmscale.config.data import DataConfig, SourceConfig
from mmscale.config.evaluation import MAIN, figure_fault
from mmscale.config.loss import TERMS, AnyTerm, LossConfig, MatryoshkaTerm
from mmscale.config.schema import Config
from mmscale.config.taught import AnchorTerm, TeacherTerm
from mmscale.config.term import Needs
from mmscale.config.training import StageConfig

# R@10 is the deepest recall.
LONGEST_LIST = 10


def trained_terms(config: Config) -> tuple[AnyTerm, ...]:
    """Every term that the run trains on at any time, those of its stages included."""
    losses = [config.loss, *(LossConfig.model_validate(s.loss) for s in config.stages if s.loss)]
    return tuple(term for loss in losses for term in loss.terms)


def fusion_heads(config: Config) -> frozenset[str]:
    """Heads of the fusion model that a term trains: `matching`, `classes`."""
    needed = (term.needs.fusion for term in trained_terms(config))
    return frozenset(head for head in needed if head is not None)


def needs_momentum(config: Config) -> bool:
    """Whether a running mean of the weights is kept."""
    queue = config.negatives.queue
    remembered = queue.size != 0 and queue.source == "momentum"
    return config.eval.weights == "ema" or remembered or needs_momentum_rows(config)


def needs_momentum_rows(config: Config) -> bool:
    """Whether a term looks at the batch as the running mean encodes it."""
    return any(term.needs.momentum for term in trained_terms(config))


def teacher_terms(config: Config) -> tuple[TeacherTerm, ...]:
    """The terms that have a teacher."""
    return tuple(term for term in config.loss.terms if isinstance(term, TeacherTerm))


def keeps_start(config: Config) -> bool:
    """Whether the weights that the run began with are kept for a term."""
    return any(term.needs.start for term in trained_terms(config))


def teacher_faults(config: Config) -> Iterator[str]:
    """Pictures that a teacher needs and does not get, and features that stand for no picture."""
    data, caches = config.data, dict[str, str | None]()
    for term in () if config.stages else teacher_terms(config):
        named = f"loss.terms holds teacher with model={term.model}"
        if caches.setdefault(term.model, term.cache) != term.cache:
            yield f"{named} twice, with cache={caches[term.model]} and {term.cache}; give one"
        if term.needs.pictures and term.cache is None and data.feature_cache is not None:
            yield (
                f"{named}, which encodes the pictures, but data.feature_cache keeps features of "
                "the trained model's towers alone; set the term's cache, or "
                "data.feature_cache=null"
            )
        if term.cache is not None and data.augment != "none":
            yield (
                f"{named} and cache={term.cache}, which with data.augment={data.augment} would "
                "show the teacher other pictures than ours; set data.augment=none, or cache=null"
            )
        if term.cache is not None and data.resampled:
            yield (
                f"{named} and cache={term.cache}, which needs to know every sample, but "
                "data.resampled=true reads shards without a manifest; set cache=null"
            )


def labelled_kinds(config: Config) -> list[str]:
    """Kinds of the terms that look at the data's labels."""
    return sorted({term.kind for term in trained_terms(config) if term.needs.labels})


def with_fusion_decided(config: Config) -> Config:
    """`model.fusion.enabled` said, where it was left to the objective."""
    fusion = config.model.fusion
    if fusion.enabled is not None:
        return config
    decided = fusion.model_copy(update={"enabled": bool(fusion_heads(config))})
    model = config.model.model_copy(update={"fusion": decided})
    return config.model_copy(update={"model": model})


def fill_logit_scale(config: Config) -> Config:
    """The scale and bias that a term's authors start from, where they are not set."""
    scale = config.model.logit_scale
    for term in config.loss.terms:
        if term.needs.logit_scale is not None:
            starts = dict(zip(("init", "bias"), term.needs.logit_scale, strict=True))
            unset = {k: v for k, v in starts.items() if k not in scale.model_fields_set}
            scale = scale.model_copy(update=unset)
    if scale == config.model.logit_scale:
        return config
    model = config.model.model_copy(update={"logit_scale": scale})
    return config.model_copy(update={"model": model})


def objective_faults(config: Config) -> Iterator[str]:
    """Terms whose input the run as configured does not make."""
    kinds = [term.kind for term in config.loss.terms]
    # Each kind once, in the order of the alphabet.
    for kind, term in sorted({term.kind: term for term in config.loss.terms}.items()):
        needs, fusion = term.needs, config.model.fusion
        if needs.logit_scale is not None and config.model.logit_scale.bias is None:
            yield (
                f"loss.terms holds {kind}, but model.logit_scale.bias is null; set it, for example "
                f"to {needs.logit_scale[1]:g}"
            )
        if kinds == ["l2_start"]:
            yield (
                "loss.terms holds l2_start alone, which lets nothing move; add what the run learns "
                "by, such as {kind: infonce}"
            )
        if needs.once is not None and kinds.count(kind) > 1:
            yield f"loss.terms holds {kind} more than once; {needs.once}"
        if needs.fusion is not None and fusion.enabled is False:
            yield (
                f"loss.terms holds {kind}, but model.fusion.enabled=false; remove the term or the "
                "setting"
            )
        if needs.fusion == "classes" and fusion.classes is None:
            yield (
                f"loss.terms holds {kind}, but model.fusion.classes is null; set it to the number "
                "of classes that the data's labels have"
            )


def matryoshka_widths(config: Config) -> tuple[int, ...]:
    """Widths below the whole one at which a term trains the embeddings."""
    terms = [term for term in trained_terms(config) if isinstance(term, MatryoshkaTerm)]
    return tuple(sorted({width for term in terms for width in term.widths}))


def width_faults(config: Config) -> Iterator[str]:
    """Widths that are no part of the embeddings, as far as a preset does not say how wide."""
    widths, model = matryoshka_widths(config), config.model
    if widths and model.preset is None and widths[-1] >= model.embed_dim:
        yield (
            f"loss.terms holds matryoshka with a width of {widths[-1]}, but model.embed_dim="
            f"{model.embed_dim}; give widths below that: the whole width is the other terms'"
        )


def fusion_faults(config: Config) -> Iterator[str]:
    """Settings that fusion contradicts, or that need it."""
    enabled = with_fusion_decided(config).model.fusion.enabled
    if enabled and config.data.feature_cache is not None and not config.stages:
        yield (
            "data.feature_cache keeps pooled features, but fusion reads both towers' tokens; set "
            f"data.feature_cache=null, or remove the terms {_who(lambda n: n.fusion is not None)}"
        )
    rerank = config.eval.rerank
    if rerank and "matching" not in fusion_heads(config):
        yield (
            f"eval.rerank={rerank}, but no matching term trains the fusion model to rank; add "
            "{kind: matching} to loss.terms or set eval.rerank=0"
        )
    if 0 < rerank < LONGEST_LIST:
        yield (
            f"eval.rerank={rerank} is shorter than the {LONGEST_LIST} candidates that recall looks "
            f"at; set eval.rerank={LONGEST_LIST} or more, or 0"
        )


def negatives_faults(config: Config) -> Iterator[str]:
    """A queue or mining that no term looks at, or a queue that ranks would fill differently."""
    terms, size = trained_terms(config), config.negatives.queue.size
    if size and not any(term.needs.queue for term in terms):
        yield (
            f"negatives.queue.size={size}, but no term of loss.terms looks at the queue "
            f"({_who(lambda n: n.queue)} do); add one or set negatives.queue.size=0"
        )
    if size and not config.negatives.gather:
        yield (
            f"negatives.queue.size={size} needs the rows of all ranks, but negatives.gather=false; "
            "set negatives.gather=true or negatives.queue.size=0"
        )
    kind = config.negatives.mining.kind
    if kind != "none" and not any(term.needs.mining for term in terms):
        yield (
            f"negatives.mining.kind={kind}, but no term of loss.terms mines "
            f"({_who(lambda n: n.mining)} do; hinge and hn_nce have settings of their own); "
            "add one or set negatives.mining.kind=none"
        )


def is_evaluated(config: Config) -> bool:
    """Whether there is any set to evaluate on."""
    return config.data.eval is not None or bool(config.eval.sets)


def set_faults(config: Config) -> Iterator[str]:
    """Evaluation sets that say too little for their kind, or what it does not read."""
    for name, chosen in config.eval.sets.items():
        path = f"eval.sets.{name}"
        if chosen.kind == "classes":
            if chosen.classes is None:
                yield (
                    f"{path}.kind=classes, but {path}.classes is not set; name a file with the "
                    "classes, or imagenet"
                )
            continue
        for setting in ("classes", "templates"):
            if (value := getattr(chosen, setting)) is not None:
                yield (
                    f"{path}.{setting}={value} has an effect only with {path}.kind=classes; make "
                    "that so, or remove it"
                )


def retain_faults(config: Config) -> Iterator[str]:
    """Retained sets that the run does not evaluate."""
    for name in config.retain.sets:
        if name not in config.eval.sets:
            known = ", ".join(config.eval.sets) or "there are none"
            yield f"retain.sets={name} is none of eval.sets ({known}); name the data there"


def figure_faults(config: Config) -> Iterator[str]:
    """Figures that the run waits for or chooses by, of a set that it does not have."""
    if not is_evaluated(config):
        return
    names = [*([MAIN] if config.data.eval is not None else []), *config.eval.sets]
    waits = (
        config.stop.patience is not None
        or config.optim.schedule == "plateau"
        or any(stage.patience is not None for stage in config.stages)
    )
    settings = {
        "checkpoint.best": config.checkpoint.best,
        "retain.metric": config.retain.metric if config.retain.budget is not None else None,
        "stop.metric": config.stop.metric if waits else None,
    }
    for setting, figure in settings.items():
        if figure is not None and (fault := figure_fault(setting, figure, names)):
            yield fault


def _who(asks: Callable[[Needs], bool]) -> str:
    """Kinds of the terms that ask for something."""
    return ", ".join(sorted(kind for kind, term in TERMS.items() if asks(term.needs)))


DATA = ("augment", "crop_scale", "feature_cache", "hard_batches")
_BLOCKS = re.compile(r"(vision|text)\[(-?\d*)(?::(-?\d*))?\]")


def expanded_stages(config: Config) -> tuple[StageConfig, ...]:
    """The stages of a run, progressive unfreezing cut into its parts; none: a run without."""
    return tuple(part for stage in config.stages for part in _parts(stage))


def _parts(stage: StageConfig) -> Iterator[StageConfig]:
    if stage.unfreeze is None:
        yield stage
        return
    count, blocks = stage.unfreeze.parts, stage.unfreeze.blocks
    duration = replace(stage.duration, amount=stage.duration.amount / count)
    for part in range(1, count + 1):
        patterns = [f"{tower}[-{part * blocks}:]" for tower in stage.unfreeze.towers]
        yield stage.model_copy(
            update={
                "name": f"{stage.name}-{part}",
                "duration": duration,
                "train": (*stage.train, *patterns),
                "unfreeze": None,
            }
        )


def stage_settings(config: Config, stage: StageConfig) -> dict[str, Any]:
    """Nested settings of one stage of a run, as if it were a run of its own.

    Cached features serve the stages in which both towers rest.
    """
    settings: dict[str, Any] = config.model_dump(mode="json")
    settings["stages"] = []
    for name in ("optim", "negatives", "data"):
        settings[name] = merged(settings[name], getattr(stage, name))
    if stage.loss:
        settings["loss"] = stage.loss
    for name in ("global_batch_size", "micro_batch_size"):
        if getattr(stage, name) is not None:
            settings["train"][name] = getattr(stage, name)
    for tower in ("vision", "text"):
        if not any(may_match(pattern, tower) for pattern in stage.train):
            settings["model"][tower]["frozen"] = True
    if not all(settings["model"][tower]["frozen"] is True for tower in ("vision", "text")):
        settings["data"]["feature_cache"] = None
    return settings


def stage_faults(config: Config) -> Iterator[str]:
    """What is wrong with the list of stages itself."""
    for number, stage in enumerate(config.stages):
        for name in stage.data.keys() - set(DATA):
            yield (
                f"stages.{number}.data.{name} cannot change within a run; a stage's data may say "
                f"{', '.join(DATA)}"
            )
        if not stage.train and stage.unfreeze is None:
            yield f"stages.{number}.train is empty; name what is trained, such as [head, scale]"


def anchor_faults(stages: Sequence[Config]) -> Iterator[str]:
    """Stages whose cached features are those of other towers than the start's."""
    moved = False
    for number, stage in enumerate(stages):
        frozen = stage.model.vision.frozen is True and stage.model.text.frozen is True
        anchored = any(isinstance(term, AnchorTerm) for term in stage.loss.terms)
        if moved and anchored and stage.data.feature_cache is not None:
            yield (
                f"stages.{number} holds an anchor and reads data.feature_cache, but a stage before "
                "it trains a tower, so that the start would be asked about other towers' features; "
                "set data.feature_cache=null"
            )
        moved = moved or not frozen


def blocks_of(pattern: str) -> tuple[str, slice] | None:
    """Tower and slice of a pattern like `vision[-2:]` or `text[0]`; None for other patterns."""
    found = _BLOCKS.fullmatch(pattern)
    if found is None or (found[2] in ("", "-") and found[3] is None) or "-" in (found[2], found[3]):
        return None
    first = int(found[2]) if found[2] else None
    if found[3] is None:
        assert first is not None, "one block has a number"
        return found[1], slice(first, None if first == -1 else first + 1)
    return found[1], slice(first, int(found[3]) if found[3] else None)


def may_match(pattern: str, tower: str) -> bool:
    """Whether a pattern could match a parameter of a tower."""
    start = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
    return start.startswith(f"{tower}.") or f"{tower}.".startswith(start)


def merged(settings: dict[str, Any], update: dict[str, Any]) -> dict[str, Any]:
    """Settings with those that differ, at any depth."""
    result = dict(settings)
    for key, value in update.items():
        inner = result.get(key)
        if isinstance(value, dict) and isinstance(inner, dict):
            value = merged(inner, value)
        result[key] = value
    return result


def data_faults(data: DataConfig) -> Iterator[str]:
    """One sentence for each contradiction."""
    if data.allow_pipe is False:
        for place in places(data.train):
            if place.startswith("pipe:"):
                yield (
                    f"data.train={place}: runs a command, which is not allowed; set "
                    "data.allow_pipe=true if you trust it"
                )
    if not data.resampled:
        if data.epoch_samples is not None:
            yield (
                f"data.epoch_samples={data.epoch_samples} is the length of a resampled epoch; set "
                "data.resampled=true, or remove it"
            )
        return
    needs_all = {
        "captions": data.captions == "flat",
        "match": data.match != "image",
        "positive_share": data.positive_share is not None,
        "feature_cache": data.feature_cache is not None,
        "hard_batches.table": data.hard_batches.table is not None,
    }
    for name in (name for name, is_set in needs_all.items() if is_set):
        yield (
            f"data.{name} needs to know every sample, data.resampled=true reads shards without a "
            "manifest; set one of the two to its default"
        )


def places(where: str | list[str] | list[SourceConfig]) -> list[str]:
    """Every folder, pattern, URL or command that a setting names."""
    if isinstance(where, str):
        return [where]
    found: list[str] = []
    for entry in where:
        found += [entry] if isinstance(entry, str) else places(entry.shards)
    return found
