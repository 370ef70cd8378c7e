"""The documentation's code runs, its commands exist, and its links lead somewhere.

Every page is played in a folder of its own, from top to bottom: files are written, commands are run, Python is
executed, data is read. What is not run as it stands is in one of the three tables below, with the reason.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import remote
import yaml
from click.testing import CliRunner
from tiny import TEMPLATE, TEXT, save_words

from ciphertune.bench import child, train
from ciphertune.cli import cli
from ciphertune.planning import measure
from ciphertune.plugins.manager import plugin_manager
from ciphertune.runs.config import load_config, parse_config, tomllib  # type: ignore[attr-defined]
from ciphertune.runs.trl import convert
from ciphertune.runs.worker_config import load_worker_config

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *(ROOT / "docs").rglob("*.md")])

# Pages that another test plays, whole and as they stand: page → the file that does.
ELSEWHERE = {
    "serve.md": "tests/serving/test_command.py",
    "write-a-backend.md": "tests/wheel/wheel.sh",
    "write-a-transport.md": "tests/wheel/wheel.sh",
    "write-a-plugin.md": "tests/wheel/wheel.sh",
}

_MAKE = "a target of the Makefile, which is what runs this test"
_INSTALL = "installs packages"
_LEFT_BEHIND = "what is left behind: another library's code"
_CIRCLES = "minutes; tests/backends/test_concrete_glwe.py trains under it"
_CONCRETE_ML = "an environment of its own, of gigabytes: make concrete-ml"
# Commands that are not run: (page, command) → why. For a command that is on the page again, its whole line; for other
# languages, the first line of the block.
_CLUSTER = "needs a cluster of several machines; tests/transports/test_ray.py makes one"
_OTHERS = "a program of others; tests/runs/test_export.py reads what it is given"
_UNIT = "needs systemd, and rights; tests/whole/test_deploy.py has the unit checked"
_MANY = "minutes of simulation; tests/planning/test_capacity.py plans for as many"

EXCLUDED = {
    (
        "planning.md",
        "ciphertune plan smollm2 --to mlwe+zmq:// --clients 1000 --chats 0.9 --client-speeds speeds.json "
        "--worker-speeds speeds.json --worker-price 0.8 --traffic-price 0.05 --up 20Mbit/s --down 100Mbit/s "
        "--latency 20ms",
    ): _MANY,
    ("concrete.md", "ciphertune worker BUNDLE --backends mlwe,concrete-glwe"): "serves until it is stopped",
    ("cluster.md", 'pip install "ciphertune[ray]"'): _INSTALL,
    ("cluster.md", "ciphertune ray up bundle --workers 4 --cpus 8"): _CLUSTER,
    ("cluster.md", "ciphertune ray up bundle --workers 8 --cpus 8"): _CLUSTER,
    ("cluster.md", "ciphertune train train.toml --to mlwe+ray://auto"): _CLUSTER,
    ("cluster.md", "ciphertune ray up bundle --workers 4 --cpus 8 --listen zmq -o curve=/keys"): _CLUSTER,
    (
        "cluster.md",
        "ciphertune ray up bundle --workers 2 --listen zmq -o curve=/keys --port 0 --addresses /shared/addresses",
    ): _CLUSTER,
    (
        "cluster.md",
        'ciphertune train train.toml --to "mlwe+zmq://file:///shared/addresses/0.address,'
        'file:///shared/addresses/1.address?curve=keys"',
    ): _CLUSTER,
    (
        "remote.md",
        'ciphertune train train.toml --to "mlwe+zmq://file:///shared/worker.address?curve=keys"',
    ): "a folder of several machines; tests/transports/test_zmq.py follows such a file",
    ("cluster.md", "ciphertune ray status"): _CLUSTER,
    ("cluster.md", "ciphertune ray scale --min-workers 1 --max-workers 8"): _CLUSTER,
    ("cluster.md", 'ciphertune train train.toml --to "mlwe+zmq://10.0.0.5:5555,10.0.0.6:5556?curve=keys"'): _CLUSTER,
    ("CONTRIBUTING.md", "make check"): _MAKE,
    ("CONTRIBUTING.md", "make test"): _MAKE,
    ("CONTRIBUTING.md", "make constraints"): _INSTALL,
    ("CONTRIBUTING.md", "make wheel"): _INSTALL,
    ("CONTRIBUTING.md", "make release"): "builds a release; for maintainers",
    ("CONTRIBUTING.md", "make arm-test"): "needs a cross compiler and an emulator; for people",
    ("CONTRIBUTING.md", ".venv/bin/pre-commit install"): "changes the checkout's Git hooks",
    ("CONTRIBUTING.md", "make demo-quick"): _MAKE,
    ("CONTRIBUTING.md", "make browser-test"): "needs a browser; for people",
    ("CONTRIBUTING.md", "make soak MINUTES=10"): "ten minutes; for people",
    ("CONTRIBUTING.md", "make fuzz RUNS=100000"): "minutes; for people",
    ("CONTRIBUTING.md", "make zoo"): "half an hour; for people",
    (
        "remote.md",
        'model = sentence_transformers.SentenceTransformer("bundle/client")',
    ): "of another bundle; tests/bundle/test_parts.py does it",
    ("CONTRIBUTING.md", "make concrete-ml"): _MAKE,
    ("README.md", 'pip install ".[demo]"   # the core is `pip install .`'): _INSTALL,
    ("README.md", "make demo"): "minutes; tests/runs/test_demo.py runs it small",
    ("README.md", "make test"): _MAKE,
    ("releasing.md", "make release PREVIOUS=ciphertune-0.N.0.whl"): "builds a release; for maintainers",
    ("performance.md", "ciphertune bench train --model smollm2 --to mlwe --tokens 1024 --steps 5 --json"): "minutes",
    ("plugins.md", "ciphertune new backend NAME"): "NAME stands for a name; tests/cli/test_new.py",
    ("plugins.md", "ciphertune new transport NAME"): "NAME stands for a name; tests/cli/test_new.py",
    ("plugins.md", "ciphertune new plugin NAME"): "NAME stands for a name; tests/cli/test_new.py",
    ("plugins.md", "ciphertune new wrapping NAME"): "NAME stands for a name; tests/cli/test_new.py",
    ("quickstart.md", "make install"): _MAKE,
    ("quickstart.md", ". .venv/bin/activate"): "the tests run in an environment already",
    ("concrete.md", 'pip install "ciphertune[concrete-glwe]"'): _INSTALL,
    ("concrete.md", "python examples/circles.py --to concrete-glwe"): _CIRCLES,
    ("private.md", 'pip install "ciphertune[private]"'): _INSTALL,
    ("private.md", "python examples/private.py --to mlwe --epochs 5"): "tests/whole/test_private.py runs it smaller",
    ("concrete.md", "python examples/circles.py --to concrete-glwe+zmq://"): _CIRCLES,
    ("from-concrete-ml.md", "python3.11 -m venv env"): _CONCRETE_ML,
    ("from-concrete-ml.md", 'env/bin/pip install "ciphertune[concrete-ml]"'): _CONCRETE_ML,
    ("from-concrete-ml.md", "env/bin/python examples/circles.py --to concrete-ml"): _CONCRETE_ML,
    (
        "from-concrete-ml.md",
        "lora_trainer = LoraTrainer(peft_model, optimizer=optimizer, loss_fn=loss_fn, training_args=training_args)",
    ): _LEFT_BEHIND,
    ("from-concrete-ml.md", "lora_training = LoraTraining(peft_model)"): _LEFT_BEHIND,
    (
        "from-concrete-ml.md",
        "lora_trainer = LoraTrainer(model=peft_model, optimizer=optimizer, loss_fn=causal_lm_loss,",
    ): _LEFT_BEHIND,
    (
        "from-concrete-ml.md",
        "model = get_peft_model(base, LoraConfig(…))          # as it was there; before or after outsource",
    ): "tests/training/test_moving_in.py reads such a checkpoint",
    ("operations.md", "install -m 644 deploy/ciphertune-worker.service /etc/systemd/system/"): _UNIT,
    ("operations.md", "install -m 644 deploy/worker.toml /etc/ciphertune/"): _UNIT,
    ("operations.md", "systemctl enable --now ciphertune-worker"): _UNIT,
    ("operations.md", "systemctl restart ciphertune-worker"): _UNIT,
    ("operations.md", "kubectl rollout restart statefulset/ciphertune-worker"): _CLUSTER,
    ("operations.md", "systemctl reload ciphertune-worker"): "tests/runs/test_worker.py sends the signal",
    ("operations.md", "curl --fail http://127.0.0.1:9100/ready"): "tests/worker/test_service.py asks",
    (
        "operations.md",
        "[[bind]]",
    ): "a part of a file that is there already; tests/runs/test_worker.py adds an address",
    (
        "operations.md",
        "ciphertune top 'zmq://10.0.0.5:5555,10.0.0.6:5555?curve=keys&client=alice'",
    ): "asks workers that the page does not start; tests/client/test_monitor.py",
    ("concrete.md", "pip install 'ciphertune[concrete-circuit]'"): _INSTALL,
    ("adapters.md", 'llama-cli -m SmolLM2-135M-Instruct.Q4_1.gguf --lora notes.gguf -p "The notes of today:"'): _OTHERS,
    ("adapters.md", "vllm serve merged"): _OTHERS,
    (
        "adapters.md",
        "vllm serve HuggingFaceTB/SmolLM2-135M-Instruct --enable-lora --lora-modules notes=out/adapter",
    ): _OTHERS,
}

# What stands for something that a test cannot have or wait for: (pages, or * for all; the text; what it becomes).
REPLACED = [
    ("*", "smollm2", "model"),  # a tiny model in the page's folder; the built-in one takes minutes
    ("*", "demo --quick", "demo --quick --steps 3"),
    ("*", "--tokens 2048 --in-features 2048 --out-features 2048", "--tokens 64 --in-features 64 --out-features 64"),
    ("*", "10.0.0.5:5555,10.0.0.6:5555", "127.0.0.1:PORT"),  # of a worker that the page itself starts
    ("*", "0.0.0.0:5555", "127.0.0.1:PORT"),
    ("*", "127.0.0.1:5555", "127.0.0.1:PORT"),
    ("operations.md", "port = 9100", "port = 0"),
    ("remote.md", "meta-llama/Llama-3.2-1B", "model"),
    ("remote.md", "/shared/worker.address", "worker.address"),
    ("cheaper.md", "--first-block 23", "--first-block 1"),
]

# Files that a page takes for granted: (page, name) → content.
_OWNER = """
to = "mlwe+zmq://127.0.0.1:PORT?curve=keys"
[model]
name = "bundle/client"
[data]
source = "text.txt"
length = 12
[training]
output = "out"
steps = 2
"""
_PLANNED = _OWNER.replace("bundle/client", "model").replace("?curve=keys", "?insecure=1")
_MINE = """
[model]
name = "model"
[data]
source = "text.txt"
length = 12
[training]
output = "out"
steps = 2
"""
_QUIZ = '{"question": "the client keeps", "choices": ["every key", "today"], "answer": "A"}\n'
GIVEN = {
    ("remote.md", "train.toml"): _OWNER,
    ("planning.md", "mine.toml"): _PLANNED,
    ("use.md", "mine.toml"): _MINE,
    ("use.md", "prompts.txt"): "the worker\nthe client\n",
    ("use.md", "questions.jsonl"): '{"prompt": "the worker sees"}\n',
    ("use.md", "held.jsonl"): '{"text": "the client keeps every key"}\n',
    ("use.md", "quiz.jsonl"): _QUIZ,
}

# Pages on backends whose packages not every platform has.
NEEDS = {"cluster.md": "ray", "concrete.md": "concrete", "private.md": "opacus"}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Secure RNG turned off:UserWarning"),  # docs/private.md says what to do
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),  # Opacus' hooks
]


@dataclasses.dataclass
class Fence:
    """A code block: its language, what else stands on its first line, and its content."""

    language: str
    title: str | None
    flags: str
    body: str
    line: int


def fences(page: Path) -> list[Fence]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in re.finditer(r"^( *)(`{3,})([^\n]*)\n(.*?)^\1\2 *$", text, re.M | re.S):
        language, _, rest = match[3].strip().partition(" ")
        title = re.search(r'title="([^"]+)"', rest)
        flags = re.sub(r'title="[^"]+"', "", rest).strip()
        found.append(Fence(language, title and title[1], flags, match[4], text.count("\n", 0, match.start()) + 1))
    return found


def commands(body: str) -> list[tuple[str, str]]:
    """The commands of a block, one a line: without comments, and as they stand."""
    lines = body.replace("\\\n", " ").splitlines()
    return [(command, line.strip()) for line in lines if (command := re.sub(r"(^|\s)#.*", "", line).strip())]


def replaced(page: Path, text: str, port: int) -> str:
    for pages, old, new in REPLACED:
        if pages in ("*", page.name):
            text = text.replace(old, new)
    return text.replace("127.0.0.1:PORT", f"127.0.0.1:{port}")


class Player:
    """Plays one page in the current folder."""

    def __init__(self, page: Path, port: int) -> None:
        self.page, self.port = page, port
        self.names: dict[str, Any] = {}
        self.workers = contextlib.ExitStack()

    def play(self, fence: Fence) -> None:
        body = replaced(self.page, fence.body, self.port)
        first = fence.body.split("\n", 1)[0].strip()
        if fence.language != "sh" and (self.page.name, first) in EXCLUDED:
            return
        where = f"{self.page.name}:{fence.line}"
        assert not fence.flags, f"{where}: nothing here knows what {fence.flags!r} means"
        if fence.title:
            Path(fence.title).write_text(body, encoding="utf-8")
        if fence.language == "python":
            exec(compile("\n" * fence.line + body, str(self.page), "exec"), self.names)
        elif fence.language == "sh":
            for command, line in commands(fence.body):
                if not {(self.page.name, command), (self.page.name, line)} & EXCLUDED.keys():
                    self.run(replaced(self.page, command, self.port))
        elif fence.language == "toml":
            self.check_toml(fence, body)
        elif fence.language == "json":
            for line in [body] if body.lstrip().startswith("[") else body.splitlines():
                json.loads(line)
        elif fence.language in ("yaml", "yml"):
            list(yaml.safe_load_all(body))
            if "model_name_or_path" in body:
                convert(yaml.safe_load(body), Path())
        elif fence.language == "csv":
            header, *rows = csv.reader(body.splitlines(), strict=True)
            assert all(len(row) == len(header) for row in rows), where
        else:
            raise AssertionError(f"{where}: nothing runs {fence.language!r}; run it here, or exclude it with a reason")

    def run(self, command: str) -> None:
        words = shlex.split(command)
        if words[:3] == ["ciphertune", "worker", "--config"]:
            self.workers.enter_context(remote.worker_of(Path(words[3])))
        elif words[:2] == ["ciphertune", "worker"]:
            assert words[3:5] == ["--bind", f"tcp://127.0.0.1:{self.port}"], command
            self.workers.enter_context(remote.worker(Path(words[2]), *words[5:], port=self.port))
        elif words[0] == "ciphertune" and not set("|><;&") & set(re.sub(r'"[^"]*"', "", command)):
            result = CliRunner().invoke(cli, words[1:])
            assert result.exit_code == 0, (command, result.output, result.exception)
        else:
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            run = subprocess.run(
                ["bash", "-euc", command],
                env={**os.environ, "PATH": path},
                capture_output=True,
                text=True,
                timeout=900,
                check=False,
            )
            assert run.returncode == 0, (command, run.stdout[-2000:], run.stderr[-2000:])

    def check_toml(self, fence: Fence, body: str) -> None:
        if fence.title == "worker.toml":
            load_worker_config(Path(fence.title))
            return
        if fence.title:
            load_config(Path(fence.title))
            return
        content = tomllib.loads(body)
        if "project" not in content:  # A part of a run's file; the rest is what no file can do without.
            least = {"model": {"name": "m"}, "data": {"source": "s"}, "training": {"output": "o"}}
            parse_config(
                {**least, **{k: {**least.get(k, {}), **v} if isinstance(v, dict) else v for k, v in content.items()}}
            )


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if fences(p) and p.name not in ELSEWHERE],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_blocks_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Path) -> None:
    if page.name in NEEDS and importlib.util.find_spec(NEEDS[page.name]) is None:
        pytest.skip(f"{NEEDS[page.name]} is not installed")
    shutil.copytree(model_folder, tmp_path / "model")
    for name in ("README.md", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    port = remote.free_port()
    (tmp_path / "text.txt").write_text(f"{TEXT} " * 40)
    for (of, name), content in GIVEN.items():
        if of == page.name:
            (tmp_path / name).write_text(replaced(page, content, port))
    (tmp_path / "examples").mkdir()
    for example in (ROOT / "examples").iterdir():
        if example.is_file():
            text = example.read_text(encoding="utf-8").replace('"smollm2"', '"../model"')
            text = text.replace('"language-reference"', '"../text.txt"').replace("length = 128", "length = 12")
            (tmp_path / "examples" / example.name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CIPHERTUNE_CACHE", str(tmp_path / "cache"))
    # Processes of benchmarks would import everything again; tests/cli/test_cli.py starts them.
    monkeypatch.setattr(train, "run_child", lambda request, cache: json.loads(json.dumps(child.steps(**request))))
    monkeypatch.setattr(measure, "_LINK_ROUNDS", 3)
    player = Player(page, port)
    try:
        with player.workers:
            for fence in fences(page):
                player.play(fence)
            for value in list(player.names.values()):
                close_session(value)
    finally:
        manager = plugin_manager()
        if "audit" in manager.names():
            manager.unregister(manager._manager.get_plugin("audit"))


def close_session(value: Any) -> None:
    """What a page leaves open, since its reader's process ends there."""
    from torch import nn

    from ciphertune import session_of
    from ciphertune.errors import NothingOutsourcedError

    if isinstance(value, nn.Module):
        with contextlib.suppress(NothingOutsourcedError):
            session_of(value).close()


@pytest.fixture(scope="module")
def model_folder(tiny: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model that takes no time, with a tokenizer of few words."""
    folder = tmp_path_factory.mktemp("model")
    tiny("llama").save_pretrained(folder)
    save_words(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_every_exclusion_is_of_a_command_that_is_there() -> None:
    there = {
        (page.name, text) for page in PAGES for fence in fences(page) for pair in commands(fence.body) for text in pair
    }
    names = {page.name for page in PAGES}
    assert all(reason for reason in EXCLUDED.values())
    assert not [entry for entry in EXCLUDED if entry[0] in names and entry not in there]
    everything = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert not [old for _, old, _ in REPLACED if old not in everything]


def test_pages_that_are_played_elsewhere_are() -> None:
    for page, file in ELSEWHERE.items():
        assert (ROOT / "docs" / page).exists(), page
        assert page.removesuffix(".md") in (ROOT / file).read_text(), (page, file)


def test_no_block_escapes_the_reader() -> None:
    """Every line that opens or closes a fence belongs to one that was found."""
    for page in PAGES:
        found = sum(2 + fence.body.count("```") for fence in fences(page))
        assert page.read_text(encoding="utf-8").count("```") == found, page.name


def command_lines(page: Path) -> set[str]:
    """What a page has of ``ciphertune`` in blocks and in running text, one line each, without what a shell adds."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"`(ciphertune [^`]+)`", text) + re.findall(r"^(ciphertune .+)$", text, re.M)
    return {re.split(r"[|;]|&&|\s#", " ".join(line.split()))[0] for line in found}


def test_commands_and_options_in_the_documentation_exist() -> None:
    found = set()
    for page in PAGES:
        for line in command_lines(page) - {"ciphertune COMMAND --help"}:
            _, *words = line.split()
            command: click.Command = cli
            while words and isinstance(command, click.Group):
                inner = command.get_command(click.Context(command), words[0])
                if inner is None:
                    break
                command = inner
                found.add(words.pop(0))
            assert command is not cli or words[0].startswith("-"), (page.name, line)
            known = {name for each in command.params for name in (*each.opts, *each.secondary_opts)}
            options = [word.partition("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)]
            assert set(options) <= known | {"--help", "-h", "--version"}, (page.name, line)
    assert {"backends", "bench", "kernel", "train", "demo", "doctor", "ray", "up", "usage"} <= found


def test_what_is_made_from_code_and_measurements_is_up_to_date() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    assert made["PAGES"]
    for page, make in made["PAGES"].items():
        assert (ROOT / "docs" / page).read_text(encoding="utf-8") == make(), "run python docs/generate.py"
    plots = made["plots"]
    assert plots.present()
    for name in plots.present():
        drawn = (ROOT / "docs" / "images" / "performance" / f"{name}.svg").read_text(encoding="utf-8")
        assert drawn.startswith(plots.made_of(name)), "run python docs/generate.py"


def test_make_targets_in_the_documentation_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in PAGES:
        for target in re.findall(r"\bmake ([a-z-]+)", "\n".join(f.body for f in fences(page) if f.language == "sh")):
            assert target in targets, (page.name, target)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for target in re.findall(r"`((?:docs|examples|benchmarks|tests|core|backends)/[\w./]+\.\w+)`", text):
        assert (ROOT / target).exists(), target
