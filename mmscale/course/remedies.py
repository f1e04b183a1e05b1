"""What the guard sets against a verdict by itself: words that a run may go on with."""

import json
from collections.abc import Callable

from mmscale.config.schema import Config

# Factor of a rate that is too high.
SLOWER = 0.1
VICREG_WEIGHT = 0.04
CALMER_SCALE = 50.0


def words_against(verdict: str, config: Config) -> tuple[str, ...]:
    """`key=value` words with values of their own, so that setting them twice changes nothing.

    Args:
        verdict: The doctor's.
        config: The run's settings now.

    Returns:
        None where settings cannot mend it: mixed-up pairs are a matter of the data, and towers that
        have not found each other one of the code.
    """
    remedy = _REMEDIES.get(verdict)
    return () if remedy is None else remedy(config)


def _slower(config: Config) -> tuple[str, ...]:
    return (f"optim.lr={config.optim.lr * SLOWER:.6g}",)


def _wider(config: Config) -> tuple[str, ...]:
    terms = [term.model_dump(mode="json") for term in config.loss.terms]
    if any(term["kind"] == "vicreg" for term in terms):
        return ()
    terms.append({"kind": "vicreg", "weight": VICREG_WEIGHT})
    return ("loss.preset=null", f"loss.terms={json.dumps(terms)}")


def _calmer_scale(config: Config) -> tuple[str, ...]:
    return (
        f"model.logit_scale.max={min(CALMER_SCALE, config.model.logit_scale.max):g}",
        f"optim.lr_scale.scale={config.optim.lr_scale.scale * SLOWER:.6g}",
    )


def _freer_scale(config: Config) -> tuple[str, ...]:
    return ("optim.lr_scale.scale=1.0", "optim.weight_decay_scale.scale=0.0")


_REMEDIES: dict[str, Callable[[Config], tuple[str, ...]]] = {
    "complete_collapse": _slower,
    "dead_tower": _slower,
    "dimensional_collapse": _wider,
    "scale_saturated": _calmer_scale,
    "scale_stuck_low": _freer_scale,
}
