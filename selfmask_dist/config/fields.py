"""What sections of the configuration are made of: kinds of field, kinds of value, and their base class.

A field belongs to one of three groups: `science` changes results, `efficiency` does not, and `orchestration`
says where a run goes and what is measured and logged.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue

# strict=False: a list is welcome where a tuple is kept; its items stay strict
NonEmpty = Annotated[str, Field(min_length=1)]
Strings = Annotated[tuple[NonEmpty, ...], Field(strict=False)]
SomeStrings = Annotated[tuple[NonEmpty, ...], Field(strict=False, min_length=1)]
Counts = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False, min_length=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Rates = Annotated[tuple[Positive, ...], Field(strict=False, min_length=2)]
StepSpan = Annotated[tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]], Field(strict=False)]
Scale = Annotated[tuple[Fraction, Fraction], Field(strict=False)]  # smallest and largest


def science(default: Any, help: str, *, unit: str = "", **constraints: Any) -> Any:
    """Return a field that changes results, with its default, its effect in words, its unit and bounds."""
    return _field("science", default, help, unit, constraints)


def efficiency(default: Any, help: str, *, unit: str = "", **constraints: Any) -> Any:
    """Return a field that changes speed or memory, and no result."""
    return _field("efficiency", default, help, unit, constraints)


def orchestration(default: Any, help: str, *, unit: str = "", **constraints: Any) -> Any:
    """Return a field that decides where a run goes, and what is measured and logged."""
    return _field("orchestration", default, help, unit, constraints)


def _field(group: str, default: Any, help: str, unit: str, constraints: dict[str, Any]) -> Any:
    notes: dict[str, JsonValue] = {"group": group, "unit": unit}
    return Field(default, description=help, json_schema_extra=notes, **constraints)


class Section(BaseModel):
    """A frozen group of keys. It is strict: true is not 1, "3" is not 3, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True
    )
