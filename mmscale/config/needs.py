"""What a run's objective and evaluation need besides two towers: each term says so in `loss.py`."""

from collections.abc import Callable, Iterator

from mmscale.config.loss import TERMS, AnyTerm, LossConfig, Needs
from mmscale.config.schema import Config

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


def _who(asks: Callable[[Needs], bool]) -> str:
    """Kinds of the terms that ask for something."""
    return ", ".join(sorted(kind for kind, term in TERMS.items() if asks(term.needs)))
