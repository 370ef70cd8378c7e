"""Checks of the values of dataclasses: types by annotation, and ranges."""

from __future__ import annotations

import dataclasses
import math
import reprlib
import typing
from collections.abc import Callable
from typing import Any

from ciphertune._support.builders import TomlBuilder
from ciphertune.errors import CipherTuneError


@dataclasses.dataclass(frozen=True)
class Range:
    """The values that a field may have.

    Attributes:
        contains: whether a value of the field's type is one of them.
        text: for messages, after "must be".
    """

    contains: Callable[[Any], bool]
    text: str


AT_LEAST_ONE = Range(lambda value: value >= 1, "1 or more")
AT_LEAST_TWO = Range(lambda value: value >= 2, "2 or more")
ABOVE_ZERO = Range(lambda value: value > 0, "above 0")
POSITIVE = Range(lambda value: 0 < value < math.inf, "a finite number above 0")
NOT_NEGATIVE = Range(lambda value: 0 <= value < math.inf, "a finite number from 0")
BELOW_ONE = Range(lambda value: 0 <= value < 1, "from 0 to below 1")
NOT_EMPTY = Range(lambda value: len(value) > 0, "one name or more")


def check_fields(instance: Any, error: type[CipherTuneError], **ranges: Range) -> None:
    """Check a frozen dataclass in its ``__post_init__``: each value against its annotation, then against its range.

    Whole numbers become floats where the annotation says float.

    Args:
        instance: the dataclass.
        error: what to raise; its message begins with the field's name.
        ranges: by field; None is allowed where the annotation has ``| None``.
    """
    builder, hints = TomlBuilder(error), typing.get_type_hints(type(instance))
    for field in dataclasses.fields(instance):
        value = builder.value(getattr(instance, field.name), hints[field.name], field.name)
        object.__setattr__(instance, field.name, value)
        allowed = ranges.get(field.name)
        if allowed is not None and value is not None and not allowed.contains(value):
            raise error(f"{field.name} must be {allowed.text}, not {reprlib.repr(value)}")
