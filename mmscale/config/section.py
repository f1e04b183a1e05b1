"""The base of every group of settings, and the numbers that several groups use."""

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]

# Weights, rates and losses are in single precision: this is its largest number, rounded down.
LARGEST = 3.4e38


class Section(BaseModel):
    """A group of settings; unknown names are refused, values never change after loading."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )


def infinite_faults(settings: Any, path: str = "") -> Iterator[str]:
    """Numbers, at any depth, that training would take for infinite, or that are none."""
    entries: Iterator[tuple[Any, Any]]
    if isinstance(settings, dict):
        entries = iter(settings.items())
    elif isinstance(settings, list | tuple):
        entries = iter(enumerate(settings))
    else:
        if isinstance(settings, float) and not abs(settings) <= LARGEST:
            yield f"{path}={settings!r} must be a finite number, of at most {LARGEST:g}; lower it"
        return
    for name, value in entries:
        yield from infinite_faults(value, f"{path}.{name}" if path else str(name))
