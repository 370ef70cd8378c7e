"""Tutorials as notebooks: the .py files here are the source, the .ipynb beside each is made from it, outputs and all.

    python docs/tutorials/build.py              # run all of them and write the notebooks
    python docs/tutorials/build.py 1-two-moons  # one of them

``tests/docs/test_tutorials.py`` runs them too, checks what their last cell prints, and fails if a notebook has other cells
than its source.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import jupytext
import nbclient
import nbformat

HERE = Path(__file__).parent
NAMES = sorted(path.stem for path in HERE.glob("[0-9]*.py"))
SECONDS = 600  # a limit for what hangs, not what a cell should take


def read(name: str) -> Any:
    """The notebook of a source file, with the same cell ids every time and no outputs."""
    notebook = jupytext.read(HERE / f"{name}.py")
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def run(notebook: Any, folder: Path, **parameters: Any) -> dict[str, Any]:
    """Execute a notebook in a folder and give what its cell tagged ``results`` printed, read as JSON.

    Args:
        notebook: gets its outputs.
        folder: where its kernel runs, and what it writes lands.
        parameters: values set after its cell tagged ``parameters``.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
        LookupError: a tag is missing.
    """
    if parameters:
        cell = _tagged(notebook, "parameters")
        cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    # Two threads suit a small machine, and keep sums, and so outputs, alike on large ones. They sleep while they wait:
    # beside other work, threads that spin take several times as long.
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "HF_HUB_OFFLINE", "PYTHONWARNINGS")
    inherited = {name: os.environ.get(name) for name in names}
    os.environ |= {"OMP_NUM_THREADS": inherited["OMP_NUM_THREADS"] or "2", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"OMP_WAIT_POLICY": inherited["OMP_WAIT_POLICY"] or "PASSIVE", "PYTHONWARNINGS": "ignore"}
    try:
        client = nbclient.NotebookClient(
            notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
        )
        client.execute()
    finally:
        for name, value in inherited.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
    printed = [o.text for o in _tagged(notebook, "results").outputs if o.get("name") == "stdout"]
    results: dict[str, Any] = json.loads("".join(printed))
    return results


def strip(notebook: Any) -> Any:
    """Without times of execution, widgets, and what went to standard error."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr" and not _widget(o)]
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def _tagged(notebook: Any, tag: str) -> Any:
    for cell in notebook.cells:
        if tag in cell.metadata.get("tags", []):
            return cell
    raise LookupError(f"the notebook has no cell tagged {tag!r}")


def _widget(output: Any) -> bool:
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def main() -> None:
    for name in sys.argv[1:] or NAMES:
        notebook = read(name)
        with tempfile.TemporaryDirectory() as folder:
            results = run(notebook, Path(folder))
        nbformat.write(strip(notebook), HERE / f"{name}.ipynb")
        print(name, json.dumps(results))


if __name__ == "__main__":
    main()
