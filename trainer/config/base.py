"""What every group of settings is made of: the base class, and the plain types of fields."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
S = TypeVar("S", bound="Settings")


class Settings(BaseModel):
    """Base of every group of settings: frozen, no unknown keys, docstrings as descriptions."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )


def raise_together(settings: S, faults: list[str]) -> S:
    if faults:
        raise ValueError("\n".join(faults))
    return settings
