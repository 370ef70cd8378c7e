"""Comparisons of backends that were made in several environments, as one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ciphertune.bench.table import tables
from ciphertune.errors import ConfigError


def merge(files: Sequence[Path]) -> dict[str, Any]:
    """Put comparisons together that ``ciphertune bench compare --json`` printed, in the order of the files.

    A backend that one environment cannot run is left out where another one ran it. One that several ran has a row of
    each: between environments their figures differ, and with them all others.

    Returns:
        As ``bench_compare``, with ``machines`` in the place of ``machine``. Names of backends end with the number of
        their environment, from 1.

    Raises:
        ConfigError: a file cannot be read or is no comparison, or they are of other products.
    """
    found = [(file, _read(file)) for file in files]
    large = found[0][1]["large"]
    for file, result in found:
        if result["large"] != large:
            raise ConfigError(
                f"{file} compares a product of {result['large']}, and {found[0][0]} one of {large}: measure both with "
                "the same --tokens, --in-features and --out-features"
            )
    able = {row["to"] for _, result in found for row in result["rows"] if "reason" not in row}
    rows = [
        {**row, "to": f"{row['to']} [{number}]"}
        for number, (_, result) in enumerate(found, 1)
        for row in result["rows"]
        if "reason" not in row or row["to"] not in able
    ]
    rows.sort(key=lambda row: str(row["to"]))
    return {"machines": [result["machine"] for _, result in found], "large": large, "rows": rows}


def _read(file: Path) -> dict[str, Any]:
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(result, dict):
            raise ValueError("it is no object")
        if not isinstance(result["machine"], Mapping) or not isinstance(result["large"], str):
            raise ValueError("it names no machine and no product")
        if not result["rows"] or not all(isinstance(row["to"], str) for row in result["rows"]):
            raise ValueError("it has no rows")
        list(tables(result))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{file} is not what 'ciphertune bench compare --json' prints: {type(error).__name__}: {error}"
        ) from error
    return result
