"""Lengths of a run that carry their unit: `300 steps`, `5 epochs`, `1M samples`."""

import re
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import core_schema

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
