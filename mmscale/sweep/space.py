"""What `mmscale sweep SPACE.yaml` searches: a configuration, ranges of its settings, a metric."""

import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import Field, ValidationError, model_validator

from mmscale.config.explain import in_yaml
from mmscale.config.load import effective, load_config, read_yaml
from mmscale.config.values import Positive, PositiveFloat, Section
from mmscale.errors import ConfigError
from mmscale.report.metrics import MEAN_RECALL


class _Range(Section):
    """Numbers from `low` to `high`."""

    @model_validator(mode="after")
    def _rises(self) -> "_Range":
        low, high = getattr(self, "low"), getattr(self, "high")  # noqa: B009 - the heirs' fields
        if low >= high:
            raise ValueError(f"low={low} must be below high={high}")
        return self


class LogUniform(_Range):
    """Every order of magnitude is as likely."""

    kind: Literal["log_uniform"]
    low: PositiveFloat
    high: PositiveFloat


class Uniform(_Range):
    """Every value is as likely."""

    kind: Literal["uniform"]
    low: float
    high: float


class Int(_Range):
    """Whole numbers, `step` apart."""

    kind: Literal["int"]
    low: int
    high: int
    step: Positive = 1


class Choice(Section):
    """One of a few values, of any form that the setting takes."""

    kind: Literal["choice"]
    values: Annotated[list[Any], Field(min_length=2)]

    @property
    def texts(self) -> list[str]:
        """The values as they stand in a word."""
        return [json.dumps(value) for value in self.values]


Parameter: TypeAlias = LogUniform | Uniform | Int | Choice
KINDS = {get_args(kind.model_fields["kind"].annotation)[0]: kind for kind in get_args(Parameter)}


class Pruning(Section):
    """Trials below the median of the others at the same evaluation are stopped."""

    after_trials: Annotated[int, Field(ge=0)] = 5
    """Trials that end before any is stopped."""
    after_evaluations: Positive = 1
    """Evaluations that every trial is granted."""


class Space(Section):
    """A search, as its file tells it."""

    base: Annotated[list[str], Field(min_length=1)]
    """Presets, files and `key=value` words that all trials share."""
    parameters: Annotated[
        dict[str, Annotated[Parameter, Field(discriminator="kind")]], Field(min_length=1)
    ]
    """The settings that differ, by dotted path."""
    trials: Positive
    """Trainings in all, over all workers."""
    metric: str = MEAN_RECALL
    """A figure of an evaluation; the last one of a trial is its value."""
    direction: Literal["maximize", "minimize"] = "maximize"
    """Where the better values lie."""
    pruning: Pruning | None = Pruning()
    """Median pruning; null: every trial runs to its end."""
    seed: int = 0
    """Of the search; the trials' own is `run.seed`."""

    def words(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        """A trial's words: the base, then those of its values that have an effect together."""
        own = tuple(f"{name}={value}" for name, value in values.items())
        try:
            kept = effective((*self.base, *own))
        except ConfigError:
            # A combination that the trial is going to be refused for.
            kept = own
        return (*self.base, *(word for word in own if word in kept))


def read_search_space(path: Path) -> Space:
    """A search whose every setting is known to exist.

    Raises:
        ConfigError: Every fault of the file, or of the configuration that it makes.
    """
    try:
        space = Space.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(path, error))) from error
    read: set[str] = set()
    for values in _corners(space):
        words = space.words(values)
        if load_config(words).run.sync:
            raise ConfigError(
                f"{path}: run.sync would be one folder for all trials; remove it, and copy the "
                "sweep's folder yourself"
            )
        read |= {name for name, value in values.items() if f"{name}={value}" in words}
    if idle := sorted(space.parameters.keys() - read):
        raise ConfigError(
            f"{path}: parameters.{idle[0]} has no effect in any trial; remove it, or set what "
            "reads it in base"
        )
    return space


def _corners(space: Space) -> Iterator[dict[str, Any]]:
    """Values with which each end and choice of each parameter comes at least once."""
    ends = {
        name: parameter.texts if isinstance(parameter, Choice) else [parameter.low, parameter.high]
        for name, parameter in space.parameters.items()
    }
    first = {name: values[0] for name, values in ends.items()}
    for name, values in ends.items():
        yield from ({**first, name: value} for value in values)


def _explain(path: Path, error: ValidationError) -> Iterator[str]:
    """A sentence for each fault."""
    for fault in error.errors():
        parts = [str(part) for part in fault["loc"]]
        owner: Any = Space
        if parts[0] == "parameters" and len(parts) > 2:
            owner = KINDS[parts.pop(2)]
        elif parts[0] == "pruning" and len(parts) > 1:
            owner = Pruning
        where, kind = f"{path}: {'.'.join(parts)}", fault["type"]
        if kind == "extra_forbidden":
            known = list(owner.model_fields)
            close = difflib.get_close_matches(parts[-1], known, 1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            yield f"{where} is no key here; {hint}"
        elif kind == "missing":
            yield f"{where} is missing; add it"
        elif kind in ("union_tag_invalid", "union_tag_not_found"):
            yield f"{where} must say its kind, one of {', '.join(KINDS)}; add kind: uniform"
        else:
            rule = str(fault["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
            yield f"{where}={in_yaml(fault['input'])}: {rule}; mend it"
