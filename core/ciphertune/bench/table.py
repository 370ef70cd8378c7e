"""The comparison of backends as tables: for terminals, and as Markdown for pages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Table = tuple[str, Sequence[str], list[tuple[str, ...]], list[str]]
"""A title, the columns, the rows, and notes to print below."""


def tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """Tables of a comparison: every backend on one product, the large product, and the backends that cannot run here.

    Args:
        result: of ``bench_compare``.
    """
    able = [row for row in result["rows"] if "reason" not in row]
    unable = [row for row in result["rows"] if "reason" in row]
    if able:
        yield _small(able)
        yield _large(able, result["large"])
    if unable:
        yield "Cannot run here", ("backend", "reason"), [(row["to"], row["reason"]) for row in unable], []


def places(result: Mapping[str, Any]) -> list[str]:
    """The machines and environments that figures are of, in words."""
    machines = result.get("machines") or [result["machine"]]
    found = []
    for number, m in enumerate(machines, 1):
        mark = f"[{number}]: " if len(machines) > 1 else ""
        cuda = "with CUDA" if m["CUDA"] else "no CUDA"
        found.append(
            f"{mark}{m['processor']} ({m['capability']}), {m['cores']} cores, {m['threads']} threads, {m['system']}, "
            f"Python {m['python']}, torch {m['torch']}, {cuda}."
        )
    return found


def markdown(result: Mapping[str, Any]) -> str:
    """The machine and the tables, as Markdown."""
    lines = [line for place in places(result) for line in (place, "")]
    for title, columns, rows, notes in tables(result):
        lines += [f"**{title}**", "", _line(columns), _line(["---"] * len(columns))]
        lines += [_line(row) for row in rows]
        lines += ["", *(f"{note}\n" for note in notes)]
    return "\n".join(lines).rstrip() + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _small(rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = (
        "backend", "security", "T × K × N", "plaintext", "key", "open", "encrypt", "evaluate", "decrypt",
        "up", "down", "key sent", "error", "of it encryption's",
    )  # fmt: skip
    cells = []
    for row in rows:
        s = row["small"]
        times = (f"{name}_s" for name in ("plaintext_fp32", "keygen", "open", "encrypt", "evaluate", "decrypt"))
        sizes = ("bytes_up", "bytes_down", "key_bytes")
        errors = ("relative_rms_error", "relative_rms_error_quantized_weight")
        cells.append(
            (
                row["to"],
                row["security_level"],
                s["product"],
                *(duration(s[name]) for name in times),
                *(size(s[name]) for name in sizes),
                *(f"{s[name]:.1e}" for name in errors),
            )
        )
    notes = [
        "key: making or loading the client's keys. open: what the worker does with the key and the weight. Errors are "
        "root mean squares over those of the outputs, against the float32 weight and against the one the worker holds."
    ]
    return "Measured: one small product with every backend", columns, cells, notes


def _large(rows: Sequence[Mapping[str, Any]], product: str) -> Table:
    columns = ("backend", "figures", "encrypt", "evaluate", "decrypt", "up", "down", "error")
    cells, notes = [], []
    for row in rows:
        large = row["large"]
        about = "~" if large["scaled"] else ""
        error = "" if large["scaled"] else f"{large['relative_rms_error']:.1e}"
        cells.append(
            (
                row["to"],
                f"SCALED from {row['small']['product']}" if large["scaled"] else "measured",
                *(about + duration(large[f"{name}_s"]) for name in ("encrypt", "evaluate", "decrypt")),
                *(about + size(large[name]) for name in ("bytes_up", "bytes_down")),
                error,
            )
        )
        if large["scaled"]:
            notes.append(f"{row['to']} was not run at this size; its times are scaled by {row['scaling']}.")
        if row["limit"]:
            notes.append(f"{row['to']}: {row['limit']}")
    return f"One product of {product} (T × K × N)", columns, cells, notes


def duration(seconds: float) -> str:
    """Seconds for people.

    >>> duration(0.0000123), duration(0.0025), duration(1.5), duration(1234.5)
    ('12.3 µs', '2.5 ms', '1.5 s', '1234 s')
    """
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name}" if seconds >= 1000 else f"{seconds / unit:.3g} {name}"
    return f"{1e6 * seconds:.3g} µs"


def size(nbytes: float) -> str:
    """Bytes for people.

    >>> size(0), size(812), size(20000), size(134217728)
    ('0', '812 B', '20 kB', '134 MB')
    """
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.3g} {name}"
    return f"{nbytes:.0f} B" if nbytes else "0"
