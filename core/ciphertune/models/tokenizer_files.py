"""Bounds on the files of a tokenizer that somebody else wrote, before anything is made of them."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from ciphertune.errors import ConfigError

LARGEST = 1 << 27
"""Bytes of a file with a vocabulary; those of the largest public ones are a quarter of it."""
LARGEST_SETTINGS = 1 << 24
"""Bytes of any other file that is read whole."""
MOST_VALUES = 1 << 23
"""Values of a JSON file: Python takes up to a hundred bytes for each."""
_MOST_STEPS = 256
"""Parts of what a tokenizer does to a text, and pieces of the templates that it puts tokens into."""
_MOST_GROWTH = 64
"""How many times as long as a text its normal form may be."""
_MOST_TOKENS = 1 << 20
"""Tokens that a text is padded to."""
_DEEPEST = 64
_VOCABULARIES = ("tokenizer.json", "vocab.*", "merges.txt", "added_tokens.json", "*.model", "*.tiktoken", "tekken.json")
_READ_WHOLE = (".json", ".jinja", ".txt")
_OWN = ("ciphertune.json", "model.safetensors.index.json")
"""Files that have bounds of their own."""


def check_tokenizer_files(folder: Path) -> None:
    """Look at the files of a bundle that are read whole, its tensors and tables aside, with distrust.

    Raises:
        ConfigError: a file is larger than what it holds gives reason for, or a tokenizer's would make much of little;
            the file and the field are named.
    """
    for place, _, names in os.walk(folder):
        for name in names:
            file = Path(place) / name
            vocabulary = any(file.match(pattern) for pattern in _VOCABULARIES)
            if name in _OWN or not (vocabulary or file.suffix in _READ_WHOLE):
                continue
            most = LARGEST if vocabulary else LARGEST_SETTINGS
            if file.stat().st_size > most:
                holds = "a vocabulary" if vocabulary else "settings"
                raise ConfigError(f"{file} is damaged: it is larger than {most} bytes, and holds {holds}")
            if file.suffix == ".json":
                state = file.stat()
                _check_json(file, state.st_size, state.st_mtime_ns, state.st_ino)


@functools.lru_cache(maxsize=64)
def _check_json(file: Path, *_: int) -> None:
    """Check a JSON file; what follows its name tells one state of it from others."""
    content = file.read_bytes()
    # Each value but the first comes after one of these: an upper bound, before Python makes anything of them.
    values = 1 + sum(content.count(sign) for sign in (b",", b"[", b"{"))
    if values > MOST_VALUES:
        _fail(file, "content", f"at most {MOST_VALUES} values", values)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is damaged: it is not JSON; {_AGAIN}") from error
    if file.name == "tokenizer.json":
        _check_steps(file, found)


def _check_steps(file: Path, content: Any) -> None:
    if not isinstance(content, dict):
        _fail(file, "content", "an object", type(content).__name__)
    growth = 1.0
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        steps = 0
        for key, value in _values(content.get(part), file, part):
            steps += not isinstance(value, str) or key not in ("charsmap", "precompiled_charsmap")
            if steps > _MOST_STEPS:
                _fail(file, part, f"at most {_MOST_STEPS} values", "more")
            if part == "normalizer" and key in ("content", "prepend") and isinstance(value, str):
                growth *= max(1, len(value))
        if growth > _MOST_GROWTH:
            _fail(file, part, f"a text at most {_MOST_GROWTH} times as long", f"{growth:g} times")
    for part in ("padding", "truncation"):
        for key, value in _values(content.get(part), file, part):
            if isinstance(value, (int, float)) and not 0 <= value <= _MOST_TOKENS:
                _fail(file, f"{part}.{key}", f"a number from 0 to {_MOST_TOKENS}", value)


def _values(tree: Any, file: Path, part: str) -> Iterator[tuple[str, Any]]:
    """Every value within a tree that is no list and no object, with the key that it stands under."""
    waiting = [("", tree, 0)]
    while waiting:
        key, value, depth = waiting.pop()
        if depth > _DEEPEST:
            _fail(file, part, f"values at most {_DEEPEST} deep", "deeper")
        if isinstance(value, dict):
            waiting += [(inner, each, depth + 1) for inner, each in value.items()]
        elif isinstance(value, list):
            waiting += [(key, each, depth + 1) for each in value]
        elif value is not None:
            yield key, value


_AGAIN = "fetch the client's part of the bundle again"


def _fail(file: Path, field: str, wanted: str, found: Any) -> NoReturn:
    raise ConfigError(f"{file} is damaged: {field}: expected {wanted}, got {found}; {_AGAIN}")
