"""Options of selection strings and sections of TOML files, as dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from ciphertune._support.builders import TextBuilder, TomlBuilder
from ciphertune._support.suggestions import closest
from ciphertune.errors import ConfigError, SelectionError

OptionsT = TypeVar("OptionsT")


def split_options(options: Mapping[str, str], *owners: type) -> list[dict[str, str]]:
    """Hand each option to the first of ``owners`` (options dataclasses) that has a field of its name.

    Raises:
        SelectionError: an option that none of them has.
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
    """Make an options dataclass from text values. The text ``none`` is None where the annotation has ``| None``.

    Raises:
        SelectionError: an unknown option, one that is missing and has no default, or a value of the wrong form.
    """
    return TextBuilder(SelectionError).build(cls, values)


def build_section(cls: type[OptionsT], content: Any) -> OptionsT:
    """Make a dataclass from the content of a TOML file.

    A dataclass that checks its own values raises a ``CipherTuneError`` whose message begins with the field's name.

    Raises:
        ConfigError: a section or key is unknown, missing, of the wrong type, or refused by its dataclass. The message
            names it as ``section.key``.
    """
    return TomlBuilder(ConfigError).build(cls, content)
