"""The table of backends in docs/concrete.md: ``python benchmarks/compare.py`` measures and writes it there.

``--print`` prints it instead; ``--json FILE`` also keeps the measurements.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ciphertune.bench.compare import bench_compare
from ciphertune.bench.table import markdown

PAGE = Path(__file__).parent.parent / "docs" / "concrete.md"
START, END = "<!-- comparison: start -->\n", "<!-- comparison: end -->\n"


def replaced(page: str, table: str) -> str:
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise SystemExit(f"{PAGE} has no place for the table: {START.strip()} … {END.strip()}")
    return f"{before}{START}{table}{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--print", action="store_true", dest="to_stdout")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not arguments.to_stdout:
        replaced(PAGE.read_text(encoding="utf-8"), "")  # better now than after minutes of measuring
    found = bench_compare(repeat=arguments.repeat)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if arguments.to_stdout:
        print(markdown(found))
    else:
        PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), markdown(found)), encoding="utf-8")


if __name__ == "__main__":
    main()
