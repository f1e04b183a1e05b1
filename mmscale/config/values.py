"""The base of every group of settings, and the values that several groups use."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
)
from pydantic_core import core_schema

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


_PATTERN = re.compile(
    r"\s*(?P<amount>\d+(?:\.\d+)?(?:[eE]\d+)?)\s*(?P<multiple>[kMG]?)\s*"
    r"(?P<unit>steps?|epochs?|samples?)\s*"
)
# More than any run takes, and still exact as a number of updates.
MOST = 1e15
_MULTIPLES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}


@dataclass(frozen=True)
class Duration:
    """An amount of `steps`, `epochs` or `samples`; parsed from text and written back as text."""

    amount: float
    unit: str

    @classmethod
    def parse(cls, value: Any) -> "Duration":
        """Read `300 steps`, `0.5 epochs` or `1M samples`.

        Raises:
            ValueError: Not a positive number with one of the three units.
        """
        if isinstance(value, Duration):
            return value
        match = _PATTERN.fullmatch(str(value))
        if match is None:
            raise ValueError(
                "must be a number with its unit, like '300 steps', '5 epochs' or '1M samples'"
            )
        amount = float(match["amount"]) * _MULTIPLES[match["multiple"]]
        if amount > MOST:
            raise ValueError(f"must be at most {MOST:g}, with its unit")
        return cls(amount, match["unit"].rstrip("s") + "s")

    def steps(self, steps_per_epoch: int, global_batch_size: int) -> int:
        """Whole updates in this duration, rounded up; zero stays zero."""
        if self.unit == "steps":
            exact = self.amount
        elif self.unit == "epochs":
            exact = self.amount * steps_per_epoch
        else:
            exact = self.amount / global_batch_size
        return -int(-exact // 1)

    def __str__(self) -> str:
        amount = int(self.amount) if self.amount == int(self.amount) else self.amount
        return f"{amount} {self.unit}"

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse,
            serialization=core_schema.plain_serializer_function_ser_schema(
                str, return_schema=core_schema.str_schema()
            ),
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {
            "type": "string",
            "pattern": r"^\s*\d+(\.\d+)?([eE]\d+)?\s*[kMG]?\s*(steps?|epochs?|samples?)\s*$",
            "examples": ["300 steps", "5 epochs", "1M samples"],
        }


StepsOf: TypeAlias = Callable[[Duration], int]

_NOW = Duration(0, "steps")
_RULE = "must be a number, or a ramp like {from: 0, to: 1, over: 1 epochs} (and start: DURATION)"


@dataclass(frozen=True)
class Ramp:
    """`first` until `start`, then a straight line to `last` in `over`, then `last`.

    A plain number is a ramp of no length; it is written back as the number.
    """

    first: float
    last: float
    over: Duration = _NOW
    start: Duration = _NOW

    @classmethod
    def constant(cls, value: float) -> "Ramp":
        """The same number throughout."""
        return cls(value, value)

    @classmethod
    def parse(cls, value: Any) -> "Ramp":
        """Read a number or a mapping.

        Raises:
            ValueError: Neither, or with an unknown or missing entry.
        """
        if isinstance(value, Ramp):
            return value
        if isinstance(value, Mapping):
            if not {"from", "to", "over"} <= value.keys() <= {"from", "to", "over", "start"}:
                raise ValueError(_RULE)
            return cls(
                _number(value["from"]),
                _number(value["to"]),
                Duration.parse(value["over"]),
                Duration.parse(value.get("start", _NOW)),
            )
        return cls.constant(_number(value))

    @property
    def is_constant(self) -> bool:
        """True when time plays no part."""
        return self.first == self.last

    def at(self, step: int, steps_of: StepsOf) -> float:
        """The value before update `step` (from 0).

        Args:
            step: Updates taken.
            steps_of: A duration in updates of this run.
        """
        if self.is_constant:
            return self.last
        start, over = steps_of(self.start), steps_of(self.over)
        share = (step - start) / over if over else float(step >= start)
        return self.first + (self.last - self.first) * min(1.0, max(0.0, share))

    def dump(self) -> float | dict[str, Any]:
        """As it stands in YAML."""
        if self.is_constant:
            return self.last
        ends: dict[str, Any] = {"from": self.first, "to": self.last, "over": str(self.over)}
        return ends if self.start == _NOW else {**ends, "start": str(self.start)}

    def __str__(self) -> str:
        if self.is_constant:
            return f"{self.last:g}"
        start = "" if self.start == _NOW else f", start: {self.start}"
        return f"{{from: {self.first:g}, to: {self.last:g}, over: {self.over}{start}}}"

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse,
            serialization=core_schema.plain_serializer_function_ser_schema(cls.dump),
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        duration = Duration.__get_pydantic_json_schema__(schema, handler)
        ends = {"from": {"type": "number"}, "to": {"type": "number"}}
        return {
            "anyOf": [
                {"type": "number"},
                {
                    "type": "object",
                    "properties": {**ends, "over": duration, "start": duration},
                    "required": ["from", "to", "over"],
                    "additionalProperties": False,
                },
            ]
        }


def whole_steps(duration: Duration) -> int:
    """A duration given in steps; where the length of an epoch plays no part."""
    assert duration.unit == "steps", f"{duration} needs the length of an epoch"
    return duration.steps(0, 1)


def within(low: float, high: float = math.inf) -> AfterValidator:
    """Limits for both ends of an annotated `Ramp`."""

    def check(ramp: Ramp) -> Ramp:
        if not (low <= ramp.first <= high and low <= ramp.last <= high):
            raise ValueError(
                f"must be at least {low:g}"
                if math.isinf(high)
                else f"must lie within [{low:g}, {high:g}]"
            )
        return ramp

    return AfterValidator(check)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(_RULE)
    try:
        number = float(value)
    except ValueError:
        raise ValueError(_RULE) from None
    if not math.isfinite(number):
        raise ValueError(_RULE)
    return number
