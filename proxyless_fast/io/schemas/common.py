"""What the schemas share: numbers as files write them, fixed values, and errors in one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from ..text import plain, short

# What a net of a file may have: a hundred times the paper's, and little enough to be built in a second or two.
MAX_PARAMETERS = 1 << 27

# pydantic puts a union's member into the place of a fault; and a table's entries stand at its top.
_MEMBERS = {"MBInvertedConvLayer", "MBConvLayer", "ZeroLayer", "IdentityLayer", "chain", "cell"}
_NO_FIELDS = _MEMBERS | {"[key]", "entries"}


class Strict(BaseModel):
    """No value is converted, no field is ignored."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


def _whole(value: Any) -> int:
    # JSON has one kind of number, and programs write 3 as 3.0.
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise PydanticCustomError("whole", "must be a whole number")
    return value


def _real(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PydanticCustomError("real", "must be a number")
    try:
        value = float(value)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise PydanticCustomError("real", "must be a finite number")
    return value


Whole = Annotated[int, BeforeValidator(_whole)]  # an int, or a float without a fraction; no bool, no text
Real = Annotated[float, BeforeValidator(_real)]  # a finite number; no bool, no text


def fixed(*allowed: Any) -> BeforeValidator:
    """Only these values: those that our nets are built by, so that a field can be read without being honoured."""

    def same(value: Any) -> Any:
        for known in allowed:
            if value == known and isinstance(value, bool) == isinstance(known, bool):
                return known
        wanted = repr(allowed[0]) if len(allowed) == 1 else f"one of {', '.join(map(repr, allowed))}"
        raise PydanticCustomError("fixed", "must be {wanted}", {"wanted": wanted})

    return BeforeValidator(same)


Size = Annotated[Whole, Field(ge=1, le=1 << 16)]  # channels, classes, pixels of a side
Stride = Annotated[Whole, Field(ge=1, le=64)]
Rate = Annotated[Real, Field(ge=0, lt=1)]


def _odd(value: int) -> int:
    if value % 2 == 0:
        raise PydanticCustomError("odd", "must be odd")
    return value


Kernel = Annotated[Whole, Field(ge=1, le=63), AfterValidator(_odd)]


Model = TypeVar("Model", bound=BaseModel)


def check(model: type[Model], content: Mapping[str, Any], source: str) -> Model:
    """The content as the model; ValueError in one sentence: source, the field's place, what is expected, what came."""
    try:
        return model.model_validate(dict(content))
    except ValidationError as error:
        faults = error.errors(include_url=False)
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise ValueError(f"{source}: {_sentence(faults[0])}{more}") from None


def _sentence(fault: Any) -> str:
    kind, context = fault["type"], fault.get("ctx", {})
    parts = [part if isinstance(part, int) else plain(str(part)) for part in fault["loc"]]
    parts = [part for part in parts if part not in _NO_FIELDS]
    place = ".".join(map(str, parts)) or "it"
    if kind == "missing":
        return f"{place} is missing"
    if kind == "extra_forbidden":
        return f"{place} is unknown and might change what the file means, got {short(fault['input'])}"
    if kind == "value_error":
        # A model's own check begins with the field, as seen from there.
        return f"{place}.{context['error']}" if parts else str(context["error"])
    tag = str(context.get("discriminator", "")).strip("'")
    if kind == "union_tag_invalid":
        return f"{place}.{tag} must be one of {context['expected_tags']}, got {short(context['tag'])}"
    if kind == "union_tag_not_found":
        got = fault["input"]
        return f"{place}.{tag} is missing" if isinstance(got, dict) else f"{place} must be an object, got {short(got)}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{place} must be an object, got {short(fault['input'])}"
    message = fault["msg"].replace("Input should be", "must be", 1)
    return f"{place} {message}, got {short(fault['input'])}"
