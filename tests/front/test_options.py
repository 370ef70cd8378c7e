"""Dataclasses made from option texts and from TOML: the same rules, each with its own errors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from ciphertune._support.options import build_options, build_section
from ciphertune._support.ranges import AT_LEAST_ONE, BELOW_ONE, NOT_EMPTY, POSITIVE, check_fields
from ciphertune.errors import CipherTuneError, ConfigError, SelectionError, TrainingError


@dataclasses.dataclass(frozen=True)
class Values:
    flag: bool = False
    count: int = 1
    ratio: float = 0.5
    name: str = "n"
    file: Path = Path("f")
    bits: Literal[8, 16] = 8
    kind: Literal["a", "b"] | None = None
    limit: float | None = 1.0
    where: str | Path | None = None
    either: int | float = 1


@dataclasses.dataclass(frozen=True)
class Inner:
    must: str
    rate: float = 1.0
    names: tuple[str, ...] = ("x",)

    def __post_init__(self) -> None:
        check_fields(self, TrainingError, rate=POSITIVE, names=NOT_EMPTY)


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    to: str = "mlwe"
    layers: tuple[str, ...] | None = None


@pytest.mark.parametrize(
    ("name", "text", "typed", "expected"),
    [
        ("flag", "true", True, True),
        ("count", "-3", -3, -3),
        ("ratio", "2", 2, 2.0),
        ("ratio", "1e-3", 1e-3, 1e-3),
        ("name", "1", "1", "1"),
        ("file", "a/b", "a/b", Path("a/b")),
        ("bits", "16", 16, 16),
        ("kind", "b", "b", "b"),
        ("limit", "2", 2, 2.0),
        ("where", "x", "x", "x"),
        ("either", "2", 2, 2),
        ("either", "2.5", 2.5, 2.5),
    ],
)
def test_text_and_toml_give_the_same_values(name: str, text: str, typed: Any, expected: Any) -> None:
    for made in (build_options(Values, {name: text}), build_section(Values, {name: typed})):
        value = getattr(made, name)
        assert value == expected
        assert type(value) is type(expected)


def test_text_says_none_and_toml_cannot() -> None:
    assert build_options(Values, {"limit": "None"}).limit is None
    assert build_options(Values, {"name": "none"}).name == "none"
    with pytest.raises(ConfigError, match=r"^limit must be a number, not 'none'$"):
        build_section(Values, {"limit": "none"})


@pytest.mark.parametrize(
    ("name", "text", "typed", "expected"),
    [
        ("flag", "2", 1, ("1 or 0", "true or false")),
        ("count", "1.5", 1.5, ("a whole number", "a whole number")),
        ("count", "yes", True, ("a whole number", "a whole number")),
        ("ratio", "x", "x", ("a number", "a number")),
        ("limit", "x", True, ("a number", "a number")),
        ("bits", "32", True, ("one of 8, 16", "one of 8, 16")),
        ("kind", "c", 1, ("one of a, b", "one of a, b")),
        ("either", "x", "x", ("a number", "a number")),
    ],
)
def test_wrong_values_are_named_with_what_they_must_be(name: str, text: str, typed: Any, expected: Any) -> None:
    with pytest.raises(SelectionError) as of_text:
        build_options(Values, {name: text})
    assert str(of_text.value) == f"option {name}={text!r} must be {expected[0]}"
    with pytest.raises(ConfigError) as of_toml:
        build_section(Values, {name: typed})
    assert str(of_toml.value) == f"{name} must be {expected[1]}, not {typed!r}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"inner": {"must": "m", "rat": 1}}, "unknown key 'inner.rat'; did you mean 'rate'? Known: must, names, rate"),
        ({"iner": {}}, "unknown key or section 'iner'; did you mean 'inner'? Known: inner, layers, to"),
        ({"inner": 3}, "[inner] must be a section"),
        ({}, "inner is missing and has no default"),
        ({"inner": {}}, "inner.must is missing and has no default"),
        ({"inner": {"must": 3}}, "inner.must must be text, not 3"),
        ({"inner": {"must": "m", "names": "x"}}, "inner.names must be a list of strings, not 'x'"),
        ({"inner": {"must": "m", "names": ["x", 1]}}, "inner.names must be a list of strings, not ['x', 1]"),
        ({"inner": {"must": "m", "names": []}}, "inner.names must be one name or more, not ()"),
        ({"inner": {"must": "m", "rate": 0}}, "inner.rate must be a finite number above 0, not 0.0"),
        ({"inner": {"must": "m", "rate": 10**400}}, "inner.rate is too large a number"),
        ({"inner": {"must": "m"}, "layers": 1}, "layers must be a list of strings, not 1"),
    ],
)
def test_places_in_a_file_are_named_by_section_and_key(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_section(Outer, content)
    assert str(caught.value) == message


def test_sections_become_dataclasses() -> None:
    made = build_section(Outer, {"inner": {"must": "m", "rate": 2, "names": ["a", "b"]}, "layers": ["l"]})
    assert made == Outer(Inner("m", 2.0, ("a", "b")), layers=("l",))
    assert type(made.inner.rate) is float


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (build_options, SelectionError, "unknown option 'mus'; did you mean 'must'? Known: must, names, rate"),
        (build_section, ConfigError, "unknown key or section 'mus'; did you mean 'must'? Known: must, names, rate"),
    ],
)
def test_unknown_and_missing_names(
    build: Callable[[type, dict[str, Any]], Any], error: type[CipherTuneError], message: str
) -> None:
    with pytest.raises(error) as caught:
        build(Inner, {"mus": "m"})
    assert str(caught.value) == message
    with pytest.raises(error, match=r"must is missing and has no default$"):
        build(Inner, {})


def test_a_dataclass_checks_its_own_fields_wherever_they_come_from() -> None:
    with pytest.raises(TrainingError, match=r"^rate must be a finite number above 0, not inf$"):
        Inner("m", rate=math.inf)
    with pytest.raises(TrainingError, match=r"^must must be text, not 3$"):
        Inner(3)  # type: ignore[arg-type]
    assert type(Inner("m", rate=2).rate) is float
    with pytest.raises(TrainingError, match="rate"):
        dataclasses.replace(Inner("m"), rate=-1.0)


@pytest.mark.parametrize(
    ("allowed", "inside", "outside"),
    [
        (AT_LEAST_ONE, (1, 10**9), (0, -1)),
        (POSITIVE, (1e-9, 3), (0, math.inf, math.nan, -1)),
        (BELOW_ONE, (0, 0.99), (1, -0.1, math.nan)),
    ],
)
def test_ranges(allowed: Any, inside: tuple[float, ...], outside: tuple[float, ...]) -> None:
    assert all(allowed.contains(value) for value in inside)
    assert not any(allowed.contains(value) for value in outside)


def test_messages_stay_short() -> None:
    with pytest.raises(ConfigError) as caught:
        build_section(Values, {"count": "x" * 5000})
    assert len(str(caught.value)) < 100


def test_an_annotation_that_cannot_be_read_is_a_mistake_of_the_program() -> None:
    @dataclasses.dataclass
    class Odd:
        value: complex = 0j

    with pytest.raises(TypeError, match="complex"):
        build_options(Odd, {"value": "1"})
