"""What a run's objective and evaluation need besides two towers."""

from collections.abc import Iterator

from mmscale.config.loss import LossConfig
from mmscale.config.schema import Config

FUSION_TERMS = frozenset({"matching", "classification"})
# R@10 is the deepest recall.
LONGEST_LIST = 10
QUEUE_TERMS = frozenset({"infonce", "siglip", "dcl", "hn_nce", "hinge", "distillation"})
MINED_TERMS = frozenset({"infonce", "siglip", "dcl"})
MOMENTUM_TERMS = frozenset({"distillation", "prototypes"})


def term_kinds(config: Config) -> frozenset[str]:
    """Kinds of every term that the run trains on at any time."""
    losses = [config.loss, *(LossConfig.model_validate(s.loss) for s in config.stages if s.loss)]
    return frozenset(term.kind for loss in losses for term in loss.terms)


def with_fusion_decided(config: Config) -> Config:
    """`model.fusion.enabled` said, where it was left to the objective."""
    fusion = config.model.fusion
    if fusion.enabled is not None:
        return config
    decided = fusion.model_copy(update={"enabled": bool(FUSION_TERMS & term_kinds(config))})
    model = config.model.model_copy(update={"fusion": decided})
    return config.model_copy(update={"model": model})


def fusion_faults(config: Config) -> Iterator[str]:
    """Settings that fusion contradicts, or that need it."""
    enabled = with_fusion_decided(config).model.fusion.enabled
    if enabled and config.data.feature_cache is not None and not config.stages:
        yield (
            "data.feature_cache keeps pooled features, but fusion reads both towers' tokens; set "
            "data.feature_cache=null, or remove the terms matching and classification"
        )
    rerank = config.eval.rerank
    if rerank and "matching" not in term_kinds(config):
        yield (
            f"eval.rerank={rerank}, but no matching term trains the fusion model to rank; add "
            "{kind: matching} to loss.terms or set eval.rerank=0"
        )
    if 0 < rerank < LONGEST_LIST:
        yield (
            f"eval.rerank={rerank} is shorter than the {LONGEST_LIST} candidates that recall looks "
            f"at; set eval.rerank={LONGEST_LIST} or more, or 0"
        )


def needs_momentum(config: Config) -> bool:
    """Whether a running mean of the weights is kept."""
    queue = config.negatives.queue
    remembered = queue.size != 0 and queue.source == "momentum"
    return config.eval.weights == "ema" or remembered or needs_momentum_rows(config)


def needs_momentum_rows(config: Config) -> bool:
    """Whether a term contrasts with the batch as the running mean encodes it."""
    return bool(MOMENTUM_TERMS & term_kinds(config))


def negatives_faults(config: Config) -> Iterator[str]:
    """A queue or mining that no term looks at, or a queue that ranks would fill differently."""
    size = config.negatives.queue.size
    if size and not QUEUE_TERMS & term_kinds(config):
        yield (
            f"negatives.queue.size={size}, but no term of loss.terms looks at the queue "
            f"({', '.join(sorted(QUEUE_TERMS))} do); add one or set negatives.queue.size=0"
        )
    if size and not config.negatives.gather:
        yield (
            f"negatives.queue.size={size} needs the rows of all ranks, but negatives.gather=false; "
            "set negatives.gather=true or negatives.queue.size=0"
        )
    kind = config.negatives.mining.kind
    if kind != "none" and not MINED_TERMS & term_kinds(config):
        yield (
            f"negatives.mining.kind={kind}, but no term of loss.terms mines "
            f"({', '.join(sorted(MINED_TERMS))} do; hinge and hn_nce have settings of their own); "
            "add one or set negatives.mining.kind=none"
        )
