"""Option dataclasses made from text."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from ciphertune._support.suggestions import closest
from ciphertune.errors import SelectionError

OptionsT = TypeVar("OptionsT")


def split_options(options: Mapping[str, str], *owners: type) -> list[dict[str, str]]:
    """Hand each option to the first of ``owners`` (options dataclasses) that has a field of its name.

    Raises:
        SelectionError: an option that none of them knows.
    """
    shares: list[dict[str, str]] = [{} for _ in owners]
    fields = [{field.name for field in dataclasses.fields(owner)} for owner in owners]
    for name, value in options.items():
        for share, names in zip(shares, fields, strict=True):
            if name in names:
                share[name] = value
                break
        else:
            raise SelectionError(f"unknown option {name!r}; {closest(name, set().union(*fields))}")
    return shares


def build_options(cls: type[OptionsT], values: Mapping[str, Any]) -> OptionsT:
    """Make an options dataclass from text values; its annotations say how each is read.

    Supported annotations: bool, int, float, str, Path, Literal of ints or strings, and each of them ``| None``.

    Raises:
        SelectionError: an unknown option, one that is missing and has no default, or a value of the wrong form.
    """
    hints = typing.get_type_hints(cls)
    unknown = [name for name in values if name not in hints]
    if unknown:
        raise SelectionError(f"unknown option {unknown[0]!r}; {closest(unknown[0], hints)}")
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if required(field) and field.name not in values:
            raise SelectionError(f"option {field.name} is missing and has no default")
    return cls(**{name: _convert(name, value, hints[name]) for name, value in values.items()})


def required(field: dataclasses.Field[Any]) -> bool:
    """Whether an option has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert(name: str, value: Any, hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        choices = [part for part in typing.get_args(hint) if part is not type(None)]
        if value is None or str(value).lower() == "none":
            return None
        hint = choices[0]
    text = str(value)
    if typing.get_origin(hint) is Literal:
        for choice in typing.get_args(hint):
            if text == str(choice):
                return choice
        listed = ", ".join(str(choice) for choice in typing.get_args(hint))
        raise SelectionError(f"option {name}={text!r} must be one of: {listed}")
    if hint is bool:
        if text.lower() in ("1", "true", "yes", "on"):
            return True
        if text.lower() in ("0", "false", "no", "off"):
            return False
        raise SelectionError(f"option {name}={text!r} must be 1 or 0")
    try:
        return hint(text)
    except ValueError as error:
        raise SelectionError(f"option {name}={text!r} must be a {hint.__name__}") from error
