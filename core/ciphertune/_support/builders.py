"""Builders that make dataclasses from texts or from TOML values; annotations say how each value is read.

Supported annotations: bool, int, float, str, Path, Literal of ints or strings, unions of these, and ``| None``. In TOML
also sections, which are dataclasses, lists of sections or of strings, which are ``tuple[X, ...]``, and sections with
keys of any name, which are ``dict[str, Any]``, or ``dict[str, str | float]`` for texts, numbers and switches.
"""

from __future__ import annotations

import abc
import dataclasses
import numbers
import reprlib
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from ciphertune._support.suggestions import closest
from ciphertune.errors import CipherTuneError

BuiltT = TypeVar("BuiltT")


def required(field: dataclasses.Field[Any]) -> bool:
    """Whether a field has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def unreadable(cls: type) -> str | None:
    """Why values of a dataclass's fields cannot be read from text, None where all can."""
    try:
        hints = typing.get_type_hints(cls)
    except Exception as error:
        return f"the types of its fields cannot be resolved: {type(error).__name__}: {error}"
    for field in dataclasses.fields(cls):
        if field.init and not _readable(hints[field.name]):
            told = getattr(hints[field.name], "__name__", hints[field.name])
            return f"no text can be read as the type of its field {field.name!r}, {told}"
    return None


def _readable(hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return all(_readable(each) for each in arguments)
    if origin is Literal:
        return all(isinstance(each, (int, str)) for each in arguments)
    return hint is type(None) or hint in TextBuilder.kinds


class Builder(abc.ABC):
    """Makes dataclasses from values of one kind.

    Args:
        error: the type of error to raise.
    """

    kinds: ClassVar[Mapping[type, tuple[Callable[[Any], Any], str]]]
    """For each scalar type, a function that reads a value or raises ``ValueError``, and what a value must be."""

    def __init__(self, error: type[CipherTuneError]) -> None:
        self.error = error

    def build(self, cls: type[BuiltT], values: Any, place: str = "") -> BuiltT:
        """Make a dataclass; ``place`` is the section that holds the values, empty for the outermost."""
        if not isinstance(values, Mapping):
            raise self.error(f"[{place}] must be a section")
        hints = typing.get_type_hints(cls)
        fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
        for name in values:
            if name not in fields:
                raise self.error(f"unknown {self.unknown(name, place)}; {closest(name, fields)}")
        converted = {name: self.value(value, hints[name], self.place(name, place)) for name, value in values.items()}
        for name, field in fields.items():
            if required(field) and name not in values:
                raise self.error(f"{self.place(name, place)} is missing and has no default")
        return self.make(cls, converted, place)

    def value(self, value: Any, hint: Any, place: str) -> Any:
        """Read one value by its annotation."""
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin in (typing.Union, types.UnionType):
            return self._one_of(value, arguments, place)
        if origin is Literal:
            for choice in arguments:
                if self.is_choice(value, choice):
                    return choice
            listed = ", ".join(str(choice) for choice in arguments)
            raise self.mismatch(value, f"one of {listed}", place)
        if origin is tuple and dataclasses.is_dataclass(arguments[0]):
            if not isinstance(value, (list, tuple)):
                raise self.mismatch(value, f"a list of sections, [[{place}]]", place)
            parts = enumerate(value, 1)
            return tuple(self.value(part, arguments[0], f"{place}[{number}]") for number, part in parts)
        if origin is dict:
            scalars = arguments[1] is not Any
            if isinstance(value, Mapping) and not (scalars and any(map(_not_scalar, value.values()))):
                return dict(value)
            raise self.mismatch(value, f"a section{' of texts, numbers and switches' * scalars}", place)
        if origin is tuple:
            if isinstance(value, (list, tuple)) and all(isinstance(part, str) for part in value):
                return tuple(value)
            raise self.mismatch(value, "a list of strings", place)
        if dataclasses.is_dataclass(hint):
            return value if isinstance(value, hint) else self.build(hint, value, place)  # type: ignore[arg-type]
        if hint not in self.kinds:
            raise TypeError(f"{place} has the annotation {hint}, which no value can be read for")
        read, expected = self.kinds[hint]
        try:
            return read(value)
        except OverflowError as error:
            raise self.error(f"{place} is too large a number") from error
        except ValueError as error:
            raise self.mismatch(value, expected, place) from error

    def _one_of(self, value: Any, hints: tuple[Any, ...], place: str) -> Any:
        if type(None) in hints and self.is_none(value):
            return None
        hints = tuple(hint for hint in hints if hint is not type(None))
        for hint in hints[:-1]:
            try:
                return self.value(value, hint, place)
            except self.error:
                continue
        return self.value(value, hints[-1], place)

    @abc.abstractmethod
    def place(self, name: str, within: str) -> str:
        """The text by which messages name a value."""

    @abc.abstractmethod
    def unknown(self, name: str, within: str) -> str:
        """The text by which messages name a value that no field has."""

    @abc.abstractmethod
    def is_none(self, value: Any) -> bool:
        """Whether this value is None."""

    @abc.abstractmethod
    def is_choice(self, value: Any, choice: Any) -> bool:
        """Whether this value is that choice of a ``Literal``."""

    def mismatch(self, value: Any, expected: str, place: str) -> CipherTuneError:
        """Make the error for a value that does not fit its annotation."""
        return self.error(f"{place} must be {expected}, not {reprlib.repr(value)}")

    def make(self, cls: type[BuiltT], values: Mapping[str, Any], place: str) -> BuiltT:
        """Make the dataclass, which may refuse the values."""
        return cls(**values)


def _not_scalar(value: Any) -> bool:
    return not isinstance(value, (str, int, float))


def _read_switch(value: Any) -> bool:
    text = str(value).lower()
    if text in ("1", "true", "yes", "on"):
        return True
    if text in ("0", "false", "no", "off"):
        return False
    raise ValueError(text)


class TextBuilder(Builder):
    """Reads the option values of a selection string, which are text."""

    kinds: ClassVar[Mapping[type, tuple[Callable[[Any], Any], str]]] = {
        bool: (_read_switch, "1 or 0"),
        int: (lambda value: int(str(value)), "a whole number"),
        float: (lambda value: float(str(value)), "a number"),
        str: (str, "text"),
        Path: (Path, "a path"),
    }

    def place(self, name: str, within: str) -> str:
        return f"option {name}"

    def unknown(self, name: str, within: str) -> str:
        return f"option {name!r}"

    def is_none(self, value: Any) -> bool:
        return value is None or str(value).lower() == "none"

    def is_choice(self, value: Any, choice: Any) -> bool:
        return str(value) == str(choice)

    def mismatch(self, value: Any, expected: str, place: str) -> CipherTuneError:
        return self.error(f"{place}={value!r} must be {expected}")

    def make(self, cls: type[BuiltT], values: Mapping[str, Any], place: str) -> BuiltT:
        try:
            return cls(**values)
        except CipherTuneError:
            raise
        except ValueError as error:
            raise self.error(str(error)) from error


def _read_exactly(kind: type) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if type(value) is not kind:
            raise ValueError(value)
        return value

    return read


def _read_whole(value: Any) -> int:
    whole: int = _read_exactly(int)(value)
    if not -(1 << 63) <= whole < 1 << 63:  # as TOML has them, and all that counts with them
        raise OverflowError(value)
    return whole


def _read_real(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(value)
    return float(value)


def _read_path(value: Any) -> Path:
    if not isinstance(value, (str, Path)):
        raise ValueError(value)
    return Path(value)


class TomlBuilder(Builder):
    """Reads the values of a TOML file, or of Python code, which have types."""

    kinds: ClassVar[Mapping[type, tuple[Callable[[Any], Any], str]]] = {
        bool: (_read_exactly(bool), "true or false"),
        int: (_read_whole, "a whole number"),
        float: (_read_real, "a number"),
        str: (_read_exactly(str), "text"),
        Path: (_read_path, "a path"),
    }

    def place(self, name: str, within: str) -> str:
        return f"{within}.{name}" if within else name

    def unknown(self, name: str, within: str) -> str:
        return f"{'key' if within else 'key or section'} {self.place(name, within)!r}"

    def is_none(self, value: Any) -> bool:
        return value is None

    def is_choice(self, value: Any, choice: Any) -> bool:
        return type(value) is type(choice) and bool(value == choice)

    def make(self, cls: type[BuiltT], values: Mapping[str, Any], place: str) -> BuiltT:
        try:
            return cls(**values)
        except CipherTuneError as error:
            raise self.error(self.place(str(error), place)) from error
