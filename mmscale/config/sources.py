"""Where training pairs come from: several sources, each with its weight."""

from typing import Annotated, Any

from pydantic import BeforeValidator, ValidationError

from mmscale.config.paths import FAULT, PathsSetting, expand
from mmscale.config.section import PositiveFloat, Section


class SourceConfig(Section):
    """One of several sources of training pairs."""

    shards: PathsSetting
    """Packed folder, globs, brace lists or URLs of tars, as for `data.train`."""
    weight: PositiveFloat = 1.0
    """How often an epoch shows each sample: the whole part in so many passes, of the fraction that
    share of one more, anew each epoch. With `resampled`: how often a shard is drawn."""


def _explained(value: Any) -> Any:
    """The value; what is wrong with an entry is told in one sentence, not once an alternative."""
    if not isinstance(value, list) or not any(isinstance(entry, dict) for entry in value):
        return value
    for number, entry in enumerate(value):
        try:
            SourceConfig.model_validate(entry)
        except ValidationError as error:
            fault = error.errors()[0]
            # What follows a name says which type of several was tried.
            name = str(fault["loc"][0]) if fault["loc"] else "it"
            rule = str(fault["msg"])
            if fault["type"] != FAULT:
                rule = rule.removeprefix("Input should be ").lower()
            raise ValueError(
                f"a list of {{shards: PLACE, weight: NUMBER}}; in entry {number}, {name}: {rule}"
            ) from error
    return value


Sources = Annotated[
    str | list[str] | list[SourceConfig], BeforeValidator(_explained), BeforeValidator(expand)
]
