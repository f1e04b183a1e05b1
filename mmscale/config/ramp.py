"""A number that may change in the course of a run: `0.5`, or `{from: 0, to: 1, over: 1 epochs}`."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from pydantic import AfterValidator, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import core_schema

from mmscale.config.duration import Duration

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
