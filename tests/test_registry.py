"""Plugins found by entry points, imported late, and kept from harming each other; and the public names."""

import builtins
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import ciphertune
from ciphertune import errors


def child(code: str, *paths: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def distribution(folder: Path, name: str, entry_points: str, module: str = "") -> None:
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)
    (folder / f"{name}.py").write_text(module)


def test_importing_loads_neither_torch_nor_plugins() -> None:
    heavy = ["torch", "numpy", "click", "rich", "transformers", "peft", "ciphertune_mlwe", "ciphertune_progress"]
    assert child(f"import sys, ciphertune; print([m for m in {heavy} if m in sys.modules])").strip() == "[]"


def test_choosing_one_backend_loads_no_other() -> None:
    code = (
        "import sys; from ciphertune.session import choose; choose('clear')\n"
        "print([m for m in sys.modules if m.startswith('ciphertune_') and '.' not in m])"
    )
    assert child(code).strip() == "['ciphertune_clear', 'ciphertune_local']"


def test_a_third_partys_backend_works_and_a_broken_one_harms_nobody(tmp_path: Path) -> None:
    distribution(
        tmp_path,
        "thirdparty",
        "[ciphertune.backends]\nthird = thirdparty:Third\n",
        "from ciphertune_clear import ClearBackend\nclass Third(ClearBackend):\n    name = 'third'\n",
    )
    distribution(
        tmp_path,
        "broken",
        "[ciphertune.backends]\nbroken = broken:Backend\n[ciphertune.plugins]\nbrokenhook = broken\n",
        "raise ImportError('libquantum is missing')\n",
    )
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import torch, ciphertune; from ciphertune.errors import PluginError\n"
        "model = torch.nn.Sequential(torch.nn.Linear(3, 2)); x = torch.ones(1, 3); want = model(x)\n"
        "print(torch.equal(ciphertune.outsource(model, 'third')(x), want))\n"
        "try: ciphertune.outsource(torch.nn.Sequential(torch.nn.Linear(3, 2)), 'broken')\n"
        "except PluginError as error: print(error)\n"
        "print(ciphertune.plugin_manager().failed)\n"
        "print(ciphertune.plugin_manager().names())\n"
    )
    works, cause, failed, names = child(code, tmp_path).strip().splitlines()
    assert works == "True"
    assert re.search(r"'broken' \(broken:Backend, from broken 1\.0\).*ImportError: libquantum is missing", cause)
    assert "libquantum" in failed
    assert "'progress'" in names
    assert "brokenhook" not in names


def test_a_name_registered_twice_is_an_error(tmp_path: Path) -> None:
    distribution(tmp_path, "usurper", "[ciphertune.backends]\nmlwe = usurper:Fake\n")
    code = (
        "from ciphertune.session import choose; from ciphertune.errors import PluginError\n"
        "try: choose('mlwe')\nexcept PluginError as error: print(error)\n"
    )
    out = child(code, tmp_path)
    assert "'mlwe' is registered twice" in out
    assert "usurper 1.0" in out
    assert "ciphertune_mlwe:MLWEBackend" in out


def test_the_environment_limits_which_plugins_load() -> None:
    code = "import os; os.environ['CIPHERTUNE_PLUGINS'] = ''; import ciphertune as c; print(c.plugin_manager().names())"
    assert child(code).strip() == "[]"


def test_public_names_are_these() -> None:
    assert ciphertune.__all__ == [
        "__version__",
        "CipherTuneError",
        "LoraTrainer",
        "OutsourcedLinear",
        "Share",
        "VetoError",
        "hookimpl",
        "outsource",
        "outsourced_layers",
        "plugin_manager",
        "restore",
        "session_of",
        "share",
        "validate",
    ]
    for name in ciphertune.__all__:
        assert getattr(ciphertune, name) is not None
    assert set(ciphertune.__all__) <= set(dir(ciphertune))


def test_the_printed_tree_of_errors_is_the_real_one() -> None:
    assert errors.__doc__ is not None
    rows = re.findall(r"^([│├└─ ]*)([A-Z]\w+)", errors.__doc__, re.M)
    parents: list[str] = []
    printed = {}
    for indent, name in rows:
        if not name.endswith("Error"):
            continue
        depth = len(indent) // 4
        parents[depth:] = [name]
        printed[name] = parents[depth - 1] if depth else "Exception"
    real = {
        name: next(base.__name__ for base in cls.__bases__ if base.__name__ not in ("ValueError", "TimeoutError"))
        for name, cls in inspect.getmembers(errors, inspect.isclass)
        if name not in dir(builtins)
    }
    assert printed == real
