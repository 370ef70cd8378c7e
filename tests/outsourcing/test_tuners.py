"""Every tuner of the installed peft, added before and after a model is outsourced, and the table of it in the docs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tuners

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"
BEGIN, END = "<!-- tuners: written by tests/outsourcing/test_tuners.py -->\n", "<!-- tuners end -->"
HEAD = "| tuner | added before | added after | in a file |\n| --- | --- | --- | --- |\n"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_table_says_what_every_tuner_does() -> None:
    rows = [tuners.look(tuner) for tuner in tuners.tuners()]
    table = HEAD + "".join(f"| {row.tuner} | {row.before} | {row.after} | {row.file} |\n" for row in rows)
    text = PAGE.read_text(encoding="utf-8")
    start = text.index(BEGIN) + len(BEGIN)
    stop = text.index(END, start)
    if os.environ.get("CIPHERTUNE_WRITE_TABLES"):
        PAGE.write_text(text[:start] + table + text[stop:], encoding="utf-8")
    else:
        assert text[start:stop] == table, "CIPHERTUNE_WRITE_TABLES=1 writes the table anew"
    assert not [row for row in rows if "deviates" in row.before + row.after]
    assert sum(row.after == "works" for row in rows) > len(rows) / 2
    # A file may name what works. What needs more than rows of data (a task's number, other adapters) it may not.
    for row in rows:
        if row.file == "yes, with the whole model":
            assert row.before == "works", row
            assert row.after != "works", row
        elif row.file == "yes" and row.before != "not tried":
            assert (row.before, row.after) == ("works", "works"), row
        elif row.file == "no":
            assert row.before != "works" or row.tuner in ("CPT", "LORA, LoftQ", "MULTITASK_PROMPT_TUNING", "POLY"), row


@pytest.mark.parametrize("tuner", ["LORA", "ADALORA", "IA3", "PROMPT_TUNING"])
@pytest.mark.filterwarnings("ignore")
def test_the_usual_ones_work_in_both_orders(tuner: str) -> None:
    assert tuners.look(tuner) == tuners.Row(tuner, "works", "works", tuners.in_a_file(tuner))
