"""The tables in docs/configuration.md: every setting with its default, from the dataclasses that hold them."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

from ciphertune._support.builders import required
from ciphertune.runs import config, worker_config
from ciphertune.selection import SessionOptions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
SECTIONS = {
    "before the sections": config.TrainConfig,
    "[model]": config.ModelSection,
    "[lora]": config.LoraSection,
    "[tuner]": config.TunerSection,
    "[data]": config.DataSection,
    "[training]": config.TrainingSection,
}


WORKER_SECTIONS = {
    "before the sections": worker_config.WorkerConfig,
    "[[bind]]": worker_config.BindSection,
    "[quotas]": worker_config.QuotaSection,
    "[metrics]": worker_config.MetricsSection,
    "[log]": worker_config.LogSection,
}


def entry_points(kind: str) -> dict[str, Any]:
    """Backends, transports or hook plugins of this distribution: name → class or module, imported."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = {}
    for name, target in project["entry-points"][f"ciphertune.{kind}"].items():
        module, _, attribute = target.partition(":")
        imported = importlib.import_module(module)
        found[name] = getattr(imported, attribute) if attribute else imported
    return found


def options() -> dict[str, list[tuple[str, type]]]:
    """Every dataclass of options by part of the page: (heading of its table, the dataclass)."""
    backends, transports, plugins = (entry_points(kind) for kind in ("backends", "transports", "plugins"))
    return {
        "selection": [
            ("Any selection string", SessionOptions),
            *((f"Backend `{name}`", backend.Options) for name, backend in backends.items()),
            *((f"Transport `{name}`", transport.Options) for name, transport in transports.items()),
        ],
        "serve": [
            (f"Transport `{name}`", transport.ServeOptions)
            for name, transport in transports.items()
            if transport.ServeOptions is not None
        ],
        "plugins": [(f"`{name}`", plugin.Options) for name, plugin in plugins.items() if hasattr(plugin, "Options")],
    }


def part(name: str) -> str:
    """The tables of one part of the page."""
    return "\n".join(f"**{heading}**\n\n{table(owner, 'option')}" for heading, owner in options()[name])


def keys() -> str:
    """The tables of a run's file."""
    return _tables(SECTIONS)


def worker_keys() -> str:
    """The tables of a worker's file."""
    return _tables(WORKER_SECTIONS)


def _tables(sections: dict[str, type]) -> str:
    nested = set(sections.values())
    parts = []
    for heading, section in sections.items():
        fields = [f for f in dataclasses.fields(section) if not _names_one_of(nested, section, f)]
        title = heading if heading[0] != "[" else f"`{heading}`"
        parts.append(f"**{title}**\n\n{_rows(section, fields, 'key')}")
    return "\n".join(parts)


def table(owner: type, what: str) -> str:
    """The fields of a dataclass, with defaults, and what its docstring says of each."""
    return _rows(owner, list(dataclasses.fields(owner)), what)


def _rows(owner: type, fields: list[dataclasses.Field[Any]], what: str) -> str:
    told = described(owner)
    lines = [f"| {what} | default | |", "| --- | --- | --- |"]
    for field in fields:
        lines.append(f"| `{field.name}` | {_default(field)} | {told[field.name]} |".replace("|  |", "| |"))
    return "\n".join(lines) + "\n"


def described(owner: type) -> dict[str, str]:
    """Field → what the docstring of the dataclass says, or of a base."""
    docstrings = [cls.__doc__ for cls in owner.__mro__ if dataclasses.is_dataclass(cls)]
    found: dict[str, str] = {}
    for docstring in docstrings:
        text = inspect.cleandoc(docstring or "")
        for names, said in re.findall(r"^    ([\w, ]+): (.*(?:\n {8,}.*)*)", text, re.M):
            for name in names.split(", "):
                found.setdefault(name, re.sub(r"\s+", " ", said).replace("``", "`").replace("|", "\\|"))
    return found


def _default(field: dataclasses.Field[Any]) -> str:
    if required(field):
        return "required"
    if field.default is dataclasses.MISSING:
        return ""
    value = field.default
    if value is None or value == ():
        return "none"
    if isinstance(value, tuple):
        return f"`[{', '.join(repr(part) for part in value)}]`".replace("'", '"')
    if isinstance(value, bool):
        return f"`{int(value)}`"
    if isinstance(value, int) and value >= 1 << 20 and value % (1 << 20) == 0:
        return f"`{value}` ({value >> 20} MiB)"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _names_one_of(sections: set[type], owner: type, field: dataclasses.Field[Any]) -> bool:
    """Whether a field of the whole file is a section."""
    whole = owner in (config.TrainConfig, worker_config.WorkerConfig)
    named = re.sub(r"^tuple\[(\w+), \.\.\.\]$", r"\1", str(field.type).removesuffix(" | None"))
    return whole and named in {s.__name__ for s in sections}
