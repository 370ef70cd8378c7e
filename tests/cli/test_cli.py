"""The command line, on what is cheap to run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import warm
from click.testing import CliRunner, Result

import ciphertune
import ciphertune.cli.doctor
from ciphertune.bench import child, train
from ciphertune.cache import Hold, cache_folder
from ciphertune.cli import _COMMANDS, LazyGroup, cli, main
from ciphertune.cli.output import print_table
from ciphertune.errors import CipherTuneError, ConfigError, PluginError
from ciphertune.plugins import registry
from ciphertune.plugins.manager import PluginManager
from ciphertune.plugins.registry import Registered
from ciphertune_clear import ClearBackend
from ciphertune_mlwe.kernels import KERNELS


def invoke(*args: str) -> Result:
    return CliRunner().invoke(cli, list(args), catch_exceptions=False)


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    probe = (
        "import sys\n"
        "from ciphertune.cli import cli\n"
        "cli.main(['--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'numpy', 'transformers', 'peft', 'rich', 'matplotlib', 'sklearn', 'ciphertune_mlwe',\n"
        "    'mlflow', 'tensorboardX', 'prometheus_client', 'ray'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))\n"
    )
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert "HEAVY []" in run.stdout
    for name in (*_COMMANDS, "ray"):
        assert f"\n  {name} " in run.stdout


@pytest.mark.parametrize("name", sorted(_COMMANDS))
def test_every_command_has_help(name: str) -> None:
    result = invoke(name, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_backends_state_their_security() -> None:
    rows = {row["name"]: row for row in json.loads(invoke("backends", "--json").stdout)}
    assert rows["mlwe"]["encrypted"] is True
    assert rows["mlwe"]["security_bits"] == 130.2
    assert rows["mlwe"]["security_level"] == ("156 bits by MATZOV, 130 by core-SVP classical, 119 by core-SVP quantum")
    assert rows["clear"]["security_level"] == "none"
    assert rows["mlwe"]["options"]["mask_memory"] == {"required": False, "default": 512}
    for name in ("clear", "simulation"):
        assert rows[name]["encrypted"] is False
        assert rows[name]["security_bits"] is None
        assert "no protection" in rows[name]["security"]
    assert "156 bits by" in invoke("backends").output


def test_backends_say_whether_answers_are_checked() -> None:
    rows = {row["name"]: row for row in json.loads(invoke("backends", "--json").stdout)}
    checked = {name: row["checked"] for name, row in rows.items() if row["package"].startswith("ciphertune ")}
    assert checked == {
        "mlwe": "before decryption",
        "concrete-ml": "no",
        **dict.fromkeys(("clear", "simulation", "concrete-glwe", "concrete-circuit"), "after decryption"),
    }
    assert invoke("backends").stdout.count("not checked: a worker can answer anything") == 1
    told = json.loads(invoke("doctor", "--json").stdout)["backends"]
    assert [name for name, facts in told.items() if "answers of workers elsewhere" in facts] == ["concrete-ml"]


def test_doctor_opens_with_a_verdict_for_each_job(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = ciphertune.cli.doctor.verdicts
    assert set(verdicts().values()) == {"ready"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in ("ray", "zmq") else object())
    assert verdicts() == {
        "train here": "ready",
        "use remote workers": 'lacks zmq: pip install "ciphertune[demo,zmq]"',
        "serve as a worker": 'lacks zmq: pip install "ciphertune[worker]"',
        "use a Ray cluster": 'lacks ray: pip install "ciphertune[demo,ray]"',
    }
    found = {
        "verdicts": verdicts(),
        "versions": {},
        "machine": {},
        "backends": {"mlwe": {"encryption loops": "portable"}},
        "plugins": [],
    }
    monkeypatch.setattr(ciphertune.cli.doctor, "diagnose", lambda: found)
    text = invoke("doctor").output
    assert text.index("train here") < text.index("lacks zmq") < text.index("Versions")
    assert "install a C compiler" in text


@pytest.mark.parametrize("command", ["backends", "plugins", "transports"])
def test_lists_fit_eighty_columns(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = invoke(command).output.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(len(line) > 60 for line in lines), "words are not cut into a narrow column"


def test_transports_and_plugins() -> None:
    rows = {row["name"]: row for row in json.loads(invoke("transports", "--json").stdout)}
    assert rows["local"]["remote"] is False
    rows = {row["name"]: row for row in json.loads(invoke("plugins", "--json").stdout)}
    assert "ciphertune_training_step" in rows["progress"]["hooks"]
    assert "local" in invoke("transports").output
    assert "progress" in invoke("plugins").output


def test_a_plugin_that_fails_is_listed_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Registered):
        def load(self) -> Any:
            raise PluginError("plugin 'broken' cannot be imported: ImportError: no module named quantum")

    rows = dict(registry.installed(registry.BACKENDS))
    rows["broken"] = Broken("broken", "nowhere:Backend", "someone 1.0", None)  # type: ignore[arg-type]
    monkeypatch.setattr(registry, "installed", lambda group: rows)
    found = {row["name"]: row for row in json.loads(invoke("backends", "--json").stdout)}
    assert "no module named quantum" in found["broken"]["reason"]
    assert found["mlwe"]["reason"] is None
    assert "quantum" in invoke("backends").output


def _install(monkeypatch: pytest.MonkeyPatch, group: str, name: str, plugin: Any) -> None:
    class Given(Registered):
        def load(self) -> Any:
            return plugin

    row = Given(name, "stranger:Plugin", "stranger 1.0", None, group)  # type: ignore[arg-type]
    real = registry.installed
    monkeypatch.setattr(registry, "installed", lambda asked: {**real(asked), **({name: row} if asked == group else {})})


class _NoOptions:
    """A class that is no backend."""


class _Explodes(ClearBackend):
    """A backend that cannot be built."""

    def __init__(self, *_: Any) -> None:
        raise RuntimeError("no such device")


@pytest.mark.parametrize("plugin", [_NoOptions, _Explodes])
def test_a_backend_that_raises_anything_disables_no_other(monkeypatch: pytest.MonkeyPatch, plugin: Any) -> None:
    _install(monkeypatch, registry.BACKENDS, "strange", plugin)
    rows = {row["name"]: row for row in json.loads(invoke("backends", "--json").stdout)}
    assert ("RuntimeError: no such device" if plugin is _Explodes else "AttributeError") in rows["strange"]["reason"]
    assert rows["mlwe"]["reason"] is None
    found = json.loads(invoke("doctor", "--json").stdout)
    ((name, reason),) = [(row["name"], row["reason"]) for row in found["plugins"] if row["package"] == "stranger 1.0"]
    assert name == "strange"
    assert ("RuntimeError: no such device" if plugin is _Explodes else "AttributeError") in reason
    assert found["backends"]["mlwe"]["kernel"]


class _Misspelt:
    """Imports well, and implements a hook that does not exist."""

    @ciphertune.hookspecs.hookimpl
    def ciphertune_trainig_step(self, trainer: Any) -> None:
        """Never called."""


def test_a_plugin_that_is_refused_or_left_out_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, registry.PLUGINS, "misspelt", _Misspelt())
    rows = {row["name"]: row for row in json.loads(invoke("plugins", "--json").stdout)}
    assert "ciphertune_trainig_step" in rows["misspelt"]["reason"]
    assert rows["misspelt"]["active"] is False
    assert rows["progress"]["reason"] is None
    assert rows["progress"]["active"] is True
    monkeypatch.setenv("CIPHERTUNE_PLUGINS", "")
    rows = {row["name"]: row for row in json.loads(invoke("plugins", "--json").stdout)}
    assert rows["progress"]["active"] is False
    assert rows["progress"]["reason"] is None


def test_plugins_with_options_are_active_where_they_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    rows = {row["name"]: row for row in json.loads(invoke("plugins", "--json").stdout)}
    assert (rows["history"]["always"], rows["history"]["active"]) == (False, False)
    assert rows["prometheus"]["options"]["port"] == {"required": False, "default": 9101}
    assert rows["history"]["options"]["path"] == {"required": True}
    assert (rows["progress"]["always"], rows["progress"]["options"]) == (True, {})
    text = invoke("plugins").output
    assert re.search(r"history\n +where named\n +options: path=…", text)
    assert re.search(r"traffic\n +where named\n +options: path=none", text)
    monkeypatch.setenv("CIPHERTUNE_PLUGINS", f"history?path={tmp_path / 'h.csv'},prometheus?port=x")
    rows = {row["name"]: row for row in json.loads(invoke("plugins", "--json").stdout)}
    assert rows["history"]["active"] is True
    assert rows["progress"]["active"] is False
    assert "must be a whole number" in rows["prometheus"]["reason"]
    assert list(tmp_path.iterdir()) == [], "asking writes nothing"


def test_a_plugin_that_fails_to_add_commands_takes_none_away(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bad:
        @ciphertune.hookspecs.hookimpl
        def ciphertune_register_commands(self, cli: Any) -> None:
            raise AttributeError("no such thing")

    manager = PluginManager()
    manager.register(Bad(), "bad")
    monkeypatch.setattr("ciphertune.plugins.manager.plugin_manager", lambda: manager)
    group = LazyGroup("ciphertune")
    with pytest.warns(RuntimeWarning, match="'bad' failed in ciphertune_register_commands: AttributeError"):
        assert "train" in group.list_commands(click.Context(group))
    assert group.get_command(click.Context(group), "train") is not None


def test_doctor_names_the_kernel() -> None:
    found = json.loads(invoke("doctor", "--json").stdout)
    assert found["backends"]["mlwe"]["kernel"] in KERNELS
    assert found["backends"]["mlwe"]["encryption loops"]
    assert found["versions"]["torch"]
    assert found["machine"]["float32 product (GMAC/s)"] > 0
    assert 0 < found["machine"]["memory available (GB)"] <= found["machine"]["memory (GB)"]
    assert "kernel" in invoke("doctor").output


@pytest.mark.parametrize("to", ["clear", "simulation?seed=1", "mlwe", "mlwe?request_bits=32"])
def test_bench_kernel_gives_one_complete_object(to: str) -> None:
    sizes = ["--tokens", "200", "--in-features", "96", "--out-features", "80", "--repeat", "2"]
    result = json.loads(invoke("bench", "kernel", "--to", to, *sizes, "--json").stdout)
    assert (result["tokens"], result["in_features"], result["out_features"]) == (200, 96, 80)
    for name in ("plaintext_fp32_s", "encrypt_s", "evaluate_s", "decrypt_s"):
        assert result[name] > 0
    exact = result["relative_rms_error_quantized_weight"]
    if to == "clear":
        assert result["relative_rms_error"] == exact < 1e-6
        assert result["security_bits"] is None
    else:
        assert 1e-6 < exact < result["relative_rms_error"] < 2e-2
    if to.startswith("mlwe"):
        bytes_per_value = 4 if "request_bits=32" in to else 3
        assert result["security_bits"] == (135.2 if "request_bits=32" in to else 130.2)
        assert (result["bytes_up"], result["bytes_down"]) == (200 * 96 * bytes_per_value, 200 * 80 * bytes_per_value)
    assert "encrypt" in invoke("bench", "kernel", "--to", to, *sizes).output


@pytest.mark.slow
def test_bench_train_compares_the_same_training(monkeypatch: pytest.MonkeyPatch) -> None:
    in_a_process = train.run_child

    def run_child(request: dict[str, Any], cache: str) -> dict[str, Any]:
        """One in a process of its own, as all are in earnest."""
        if request["to"] is not None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(subprocess, "run", warm.completed)
                return in_a_process(request, cache)
        found: dict[str, Any] = json.loads(json.dumps(child.steps(**request)))
        return found

    monkeypatch.setattr(train, "run_child", run_child)
    arguments = ["--model", "mlp", "--to", "mlwe", "--tokens", "32", "--steps", "3", "--json"]
    result = json.loads(invoke("bench", "train", *arguments).stdout)
    plain, encrypted = result["loss_plaintext"], result["loss_encrypted"]
    assert len(plain) == len(encrypted) == 3
    assert all(abs(a - b) < 0.05 * a for a, b in zip(plain, encrypted, strict=True))
    assert plain != encrypted
    assert result["plaintext_step_s"] > 0 < result["encrypted_step_s"]
    assert result["peak_rss_mb"] > 50
    # Three layers forward, and backward for all but the first, whose input needs no gradient.
    assert result["requests"] == 5
    assert result["bytes_up"] > 0 < result["bytes_down"]
    assert (result["micro_batches"], result["interleave"]) == (1, 1)


def test_bench_train_interleaves_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    # In this process: how a child is started is in the test above.
    monkeypatch.setattr(train, "run_child", lambda request, cache: json.loads(json.dumps(child.steps(**request))))
    arguments = ["--model", "mlp", "--to", "clear", "--tokens", "32", "--steps", "2", "--micro-batches", "4"]
    result = json.loads(invoke("bench", "train", *arguments, "--interleave", "2", "--json").stdout)
    assert (result["micro_batches"], result["interleave"], result["requests"]) == (4, 2, 4 * 5)
    assert result["loss_encrypted"] == pytest.approx(result["loss_plaintext"], rel=1e-3)
    with pytest.raises(ConfigError, match="cannot be cut into 2 micro-batches"):
        child.steps("mlp", "clear", tokens=9, count=2, seed=0, micro_batches=2, interleave=1)


def test_the_last_line_of_a_benchmarks_process_says_why_it_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> "subprocess.CompletedProcess[str]":
        return subprocess.CompletedProcess(command, 1, "", "Traceback\n  a line\nConfigError: no room\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(CipherTuneError, match="ended with status 1: ConfigError: no room"):
        train.run_child({}, "nowhere")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "kernel", "--to", "mlew"], "did you mean 'mlwe'"),
        (["bench", "kernel", "--to", "mlwe?request_bit=24"], "did you mean 'request_bits'"),
        (["bench", "kernel", "--tokens", "0"], "tokens must be 1 or more"),
        (["bench", "train", "--steps", "1"], "steps must be 2 or more"),
        (["bench", "train", "--repeat", "0"], "repeat must be 1 or more"),
        (["bench", "train", "--interleave", "2"], "interleave must be from 1 to the number of micro-batches, 1, not 2"),
        (["train", "nowhere.toml"], "cannot read nowhere.toml"),
        (["demo", "--steps", "0", "--output", "{tmp}"], "steps must be 1 or more"),
        (["demo", "--quick", "--to", "mlwe+pigeon://x", "--output", "{tmp}"], "unknown transport 'pigeon'"),
    ],
)
def test_errors_are_one_line_and_exit_with_1(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([argument.format(tmp=tmp_path) for argument in arguments])
    assert exit_.value.code == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("ciphertune: ")
    assert message in last


@pytest.mark.parametrize(("raised", "status"), [(KeyboardInterrupt, 130), (None, 0)])
def test_exit_status(
    raised: type[BaseException] | None, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def diagnose() -> dict[str, Any]:
        if raised is not None:
            raise raised
        return {"versions": {}, "machine": {}, "backends": {}, "plugins": []}

    monkeypatch.setattr(ciphertune.cli.doctor, "diagnose", diagnose)
    with pytest.raises(SystemExit) as exit_:
        main(["doctor", "--json"])
    assert exit_.value.code == status
    assert ("interrupted" in capsys.readouterr().err) == (status == 130)


_FULL = """
import os, runpy, sys, warnings
warnings.simplefilter("ignore")
os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
runpy.run_module("ciphertune", run_name="__main__", alter_sys=True)
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize(
    "words",
    ["doctor", "doctor --json", "backends", "plugins --json", "transports", "share smollm2", "cache --json", "--help"],
)
def test_a_command_whose_output_cannot_be_written_says_so_and_fails(words: str) -> None:
    ran = warm.run(_FULL, *words.split())
    said = ran.stderr.splitlines()[-1:]
    assert (ran.returncode, said) == (1, ["ciphertune: what this prints cannot be written: No space left on device"])


def test_a_wrong_option_shows_the_usage_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["doctor", "--jsn"])
    assert exit_.value.code == 2
    assert "No such option" in capsys.readouterr().err


def test_python_m_runs_the_same_commands() -> None:
    run = subprocess.run([sys.executable, "-m", "ciphertune", "--version"], capture_output=True, text=True, check=True)
    assert ciphertune.__version__ in run.stdout


def test_plugins_can_add_commands() -> None:
    probe = (
        "import click\n"
        "from ciphertune.hookspecs import hookimpl\n"
        "from ciphertune.plugins.manager import plugin_manager\n"
        "class Extra:\n"
        "    @hookimpl\n"
        "    def ciphertune_register_commands(self, cli):\n"
        "        cli.add_command(click.Command('extra', callback=lambda: click.echo('hello'), help='One more.'))\n"
        "plugin_manager().register(Extra())\n"
        "from ciphertune.cli import main\n"
        "main(ARGS)\n"
    )
    for arguments, expected in ((["--help"], "One more."), (["extra"], "hello")):
        run = subprocess.run(
            [sys.executable, "-c", probe.replace("ARGS", repr(arguments))], capture_output=True, text=True, check=True
        )
        assert expected in run.stdout


def test_brackets_in_tables_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("to [::1]:5555", ["what"], [('pip install "ciphertune[concrete-ml]"',)])
    shown = capsys.readouterr().out
    assert "[::1]:5555" in shown
    assert "ciphertune[concrete-ml]" in shown


def test_the_cache_is_shown_and_emptied_but_for_what_is_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIPHERTUNE_CACHE", str(tmp_path))
    assert "Nothing is kept" in invoke("cache").output
    for part, name in (("a", "one"), ("a", "two"), ("b", "three")):
        used = Hold(tmp_path / part / name)
        (tmp_path / part / name / "file").write_bytes(bytes(1000))
        if name == "two":
            held = used
        else:
            used.close()
    assert [row["bytes"] for row in json.loads(invoke("cache", "--json").output)["kept"]] == [1000] * 3
    assert [row["name"] for row in json.loads(invoke("cache", "--part", "b", "--json").output)["kept"]] == ["three"]
    assert "Removed 2 entries" in invoke("cache", "--clear").output
    assert sorted(path.name for path in tmp_path.glob("*/*")) == ["two"]
    held.close()
    assert json.loads(invoke("cache", "--clear", "--json").output) == {"kept": [], "removed_bytes": 1000}


def test_the_cache_folder_is_the_users_or_the_one_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CIPHERTUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("part") == tmp_path / "ciphertune" / "part"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder("part") == Path.home() / ".cache" / "ciphertune" / "part"
    monkeypatch.setenv("CIPHERTUNE_CACHE", "~/here")
    assert cache_folder("part") == Path.home() / "here" / "part"


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, {"GOMP_SPINCOUNT": "20000"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_the_command_says_how_threads_of_torch_wait(
    given: dict[str, str],
    found: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is put back in the end
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert {name: os.environ[name] for name in names if name in os.environ} == found
