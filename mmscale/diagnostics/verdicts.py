"""The doctor's verdicts in their order, and the rule of each.

A rule reads figures and nothing else; it says whether its verdict holds, how sure that is, on which
figures, what to check and what to set. Adding one: write it in a `rules_*` file and enter it here.
"""

from collections.abc import Callable

from mmscale.diagnostics.finding import Figures, Finding
from mmscale.diagnostics.rules_neighbours import false_negatives, hubness
from mmscale.diagnostics.rules_pairing import shuffled_pairs, unaligned
from mmscale.diagnostics.rules_space import (
    complete_collapse,
    dead_tower,
    dimensional_collapse,
    too_few_samples,
)
from mmscale.diagnostics.rules_training import overfit, scale_saturated, scale_stuck_low

RULES: dict[str, Callable[[Figures], Finding]] = {
    "too_few_samples": too_few_samples,
    "complete_collapse": complete_collapse,
    "dead_tower": dead_tower,
    "dimensional_collapse": dimensional_collapse,
    "shuffled_pairs": shuffled_pairs,
    "unaligned": unaligned,
    "scale_saturated": scale_saturated,
    "scale_stuck_low": scale_stuck_low,
    "overfit": overfit,
    "false_negatives": false_negatives,
    "hubness": hubness,
}
"""The first that holds is the verdict; none: `healthy`."""

ORDER = (*RULES, "healthy")
