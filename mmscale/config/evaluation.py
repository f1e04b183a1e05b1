"""Settings of the evaluations: when they are made, and on which sets."""

import re
from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from mmscale.config.paths import PathSetting, PlacesSetting
from mmscale.config.values import Duration, NonNegativeFloat, Positive, Section

# What `data.eval` is called where sets have names.
MAIN = "main"
PREFIX = "eval/"
# What a set is judged by: mean recall of pairs, accuracy of classes.
HEADLINES = MEAN, TOP1 = "mean", "top1"
# What an evaluation looked at, beside its figures.
COUNTS = ("images", "captions", "classes")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class EvalSetConfig(Section):
    """One named evaluation set."""

    data: PlacesSetting
    """Packed folder of held-out pairs, or globs, brace lists or URLs of tars, as `data.eval`. Of
    labelled images: tars of this machine, a folder of them, or one with a folder for each class."""
    kind: Literal["retrieval", "classes"] = "retrieval"
    """What is measured: recall of images and captions, or zero-shot classification."""
    classes: PathSetting | None = None
    """With `kind: classes`, the names: a file with one a line or a JSON list, or `imagenet`."""
    templates: PathSetting | None = None
    """With `kind: classes`, the prompts: OpenCLIP's `openai` (80, the default) or `simple` (7), or
    a file with one a line or a JSON list, and `{}` where the name goes."""


def _with_sound_names(sets: dict[str, Any]) -> dict[str, Any]:
    for name in sets:
        if name == MAIN:
            raise ValueError("without a set named main, which is data.eval")
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"without {name!r}: a set's name has letters, digits, `.`, `_` and `-`"
            )
    return sets


class EvalConfig(Section):
    """Figures on held-out data."""

    every: Duration | None = Duration(1, "epochs")
    """How often; null: only at the end."""
    sets: Annotated[dict[str, EvalSetConfig], AfterValidator(_with_sound_names)] = Field(
        default_factory=dict
    )
    """Further sets by name, `{coco: {data: shards/coco/val}}`: logged as `eval/coco/i2t_r1`."""
    batch_size: Positive = 128
    """Rows a rank encodes at once."""
    weights: Literal["trained", "ema"] = "trained"
    """What is evaluated: the trained weights, or their running mean (`model.momentum`)."""
    rerank: Annotated[int, Field(ge=0)] = 0
    """First candidates of each query that fusion puts in another order, reported apart; 0 = off."""


class RetainConfig(Section):
    """What a run is not to forget."""

    sets: tuple[str, ...] = ()
    """Names of `eval.sets`: at each evaluation they are compared with the run's start."""
    budget: NonNegativeFloat | None = None
    """Points of mean recall, or of top-1 accuracy, that each may lose: at its end the run walks the
    line from its first to its last weights, and the best point within becomes RUN/best."""
    metric: str = "eval/mean"
    """Figure of an evaluation that counts as gain."""


def setting_of(name: str) -> str:
    """The setting that names a set's data."""
    return "data.eval" if name == MAIN else f"eval.sets.{name}.data"


def logged(name: str, figure: str) -> str:
    """What a figure of a set is called in the log."""
    return f"{PREFIX}{figure}" if name == MAIN else f"{PREFIX}{name}/{figure}"


def figure_fault(setting: str, figure: str, names: Collection[str]) -> str | None:
    """What a figure has against it where the sets of an evaluation are these; None: nothing."""
    kind = figure.rpartition("/")[2]
    if kind in COUNTS:
        return f"{setting}={figure} counts {kind}, which no training changes; name a recall"
    if (name := set_named_in(figure)) in names:
        return None
    about = "data.eval" if name == MAIN else f"the evaluation set {name}"
    others = " or ".join(logged(known, "FIGURE") for known in names)
    return f"{setting}={figure} is a figure of {about}, and there is none; name {others}"


def set_named_in(figure: str) -> str:
    """The set that a logged figure is of."""
    name, slash, _ = figure.removeprefix(PREFIX).partition("/")
    return name if slash else MAIN
