"""What the terms of the objective ask of the other settings."""

from collections.abc import Iterator

from mmscale.config.schema import Config

SIGLIP_SCALE = 10.0
SIGLIP_BIAS = -10.0


def fill_logit_scale(config: Config) -> Config:
    """With a `siglip` term: the scale and bias that its authors start from, unless they are set.

    Source: Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", section 3.2.
    """
    scale = config.model.logit_scale
    filled = {
        name: value
        for name, value in (("init", SIGLIP_SCALE), ("bias", SIGLIP_BIAS))
        if name not in scale.model_fields_set
    }
    if not filled or "siglip" not in _kinds(config):
        return config
    model = config.model.model_copy(update={"logit_scale": scale.model_copy(update=filled)})
    return config.model_copy(update={"model": model})


def objective_faults(config: Config) -> Iterator[str]:
    """Terms whose input the run as configured does not make."""
    kinds = _kinds(config)
    if "siglip" in kinds and config.model.logit_scale.bias is None:
        yield (
            "loss.terms holds siglip, but model.logit_scale.bias is null; set it, for example to "
            f"{SIGLIP_BIAS:g}"
        )
    if sum(term.kind == "prototypes" for term in config.loss.terms) > 1:
        yield (
            "loss.terms holds prototypes more than once; name every number of clusters in one "
            "term's clusters"
        )
    fusion = config.model.fusion
    for kind in sorted(kinds & {"matching", "classification"}):
        if fusion.enabled is False:
            yield (
                f"loss.terms holds {kind}, but model.fusion.enabled=false; remove the term or the "
                "setting"
            )
    if "classification" in kinds and fusion.classes is None:
        yield (
            "loss.terms holds classification, but model.fusion.classes is null; set it to the "
            "number of classes that the data's labels have"
        )


def _kinds(config: Config) -> set[str]:
    return {term.kind for term in config.loss.terms}
