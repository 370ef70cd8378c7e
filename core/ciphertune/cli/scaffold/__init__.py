"""Projects for plugins, ready to be filled in: ``ciphertune new``."""

from __future__ import annotations

import re
import string
from pathlib import Path
from typing import Literal

from ciphertune._support.atomic import atomic_directory
from ciphertune._support.version import __version__
from ciphertune.errors import ConfigError
from ciphertune.plugins import registry

Kind = Literal["transport", "wrapping", "backend", "plugin"]
"""A ``wrapping`` is a transport around another."""

GROUPS: dict[Kind, str] = {
    "transport": registry.TRANSPORTS,
    "wrapping": registry.TRANSPORTS,
    "backend": registry.BACKENDS,
    "plugin": registry.PLUGINS,
}
"""Entry-point group of each kind."""

_NAME = re.compile(r"[a-z][a-z0-9]*(?:-[a-z0-9]+)*\Z")
_SUFFIX = ".tmpl"
_TEMPLATES = Path(__file__).parent


def new_project(kind: Kind, name: str, target: Path | None = None) -> list[Path]:
    """Write a project for a plugin: entry point, skeleton, the conformance suite, workflow for its tests, README.

    Args:
        kind: what it is to be.
        name: as in a selection string: lower case, digits, single hyphens. The distribution is ``ciphertune-NAME``.
        target: a folder that does not exist; ``ciphertune-NAME`` in the current one if not given.

    Returns:
        The files, relative to ``target``.

    Raises:
        ConfigError: the name is none, or CipherTune's own, or the folder exists or cannot be written.
    """
    if not _NAME.match(name):
        raise ConfigError(f"{name!r} is no name for a plugin: lower-case letters and digits, with single hyphens")
    if name in registry.own_names(GROUPS[kind]):
        raise ConfigError(
            f"{name!r} is the name of CipherTune's own {registry.KINDS[GROUPS[kind]]}, which no other package may take"
        )
    folder = target if target is not None else Path(f"ciphertune-{name}")
    if folder.exists():
        raise ConfigError(f"{folder} exists already")
    module = name.replace("-", "_")
    words = {
        "name": name,
        "module": f"ciphertune_{module}",
        "title": "".join(part.capitalize() for part in name.split("-")),
        "version": __version__,
        "next": _next_version(__version__),
    }
    try:
        with atomic_directory(folder, 0o755) as draft:
            return sorted(_write(file, draft, words) for file in _TEMPLATES.joinpath(kind).rglob(f"*{_SUFFIX}"))
    except OSError as error:
        raise ConfigError(f"cannot write {folder}: {error.strerror}") from error


def _next_version(version: str) -> str:
    """The first version that may break a plugin: the next minor one before 1.0, the next major one after.

    >>> _next_version("0.1.3"), _next_version("1.4.0")
    ('0.2', '2')
    """
    major, minor = version.split(".")[:2]
    return f"0.{int(minor) + 1}" if major == "0" else str(int(major) + 1)


def _write(template: Path, draft: Path, words: dict[str, str]) -> Path:
    """Fill one template in; where it went, relative to ``draft``."""
    inside = template.relative_to(_TEMPLATES).parts[1:]
    parts = [
        # Hidden files of the templates would be left out of wheels, or take effect here.
        re.sub("^DOT_", ".", part.replace("MODULE", words["module"]).replace("NAME", words["name"].replace("-", "_")))
        for part in inside
    ]
    file = Path(*parts).with_suffix("")
    (draft / file).parent.mkdir(parents=True, exist_ok=True)
    text = string.Template(template.read_text(encoding="utf-8")).substitute(words)
    (draft / file).write_text(text, encoding="utf-8")
    return file
