"""What people reported of fine-tuning, splitting, serving and command lines elsewhere, as small cases here."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import warm
from click.testing import CliRunner, Result
from remote import with_adapter
from torch import Tensor, nn

import ciphertune
from ciphertune.cli import cli, main
from ciphertune.client.choice import choose
from ciphertune.data.splitting import split
from ciphertune.errors import CipherTuneError, ConfigError, SelectionError
from ciphertune.hookspecs import hookimpl
from ciphertune.plugins import registry
from ciphertune.plugins.manager import plugin_manager
from ciphertune.training.lora import add_lora
from ciphertune.weights import quantize
from ciphertune.worker.service import Service
from ciphertune.worker.store import WeightStore
from ciphertune.worker.worker import Worker
from ciphertune.workloads.texts import rows_of

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

MODES = ("clear", "simulation", "mlwe")


def toy(*sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def error(got: Tensor, want: Tensor) -> float:
    """Relative, with the rounding of weights to 8 bits in it."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


def compare(
    make: Callable[[], nn.Module], run: Callable[[nn.Module], Sequence[Tensor]], mode: str, tolerance: float = 2e-2
) -> None:
    """``run(model)`` gives tensors; those of the outsourced model are those of the plain one."""
    wanted = [tensor.detach().clone() for tensor in run(make())]
    model = ciphertune.outsource(make(), to=mode, layers="all")
    for got, want in zip(run(model), wanted, strict=True):
        assert got.shape == want.shape
        assert got.dtype == want.dtype
        assert error(got, want) <= tolerance
    ciphertune.session_of(model).close()


def outputs_and_gradients(x: Tensor) -> Callable[[nn.Module], tuple[Tensor, Tensor]]:
    def run(model: nn.Module) -> tuple[Tensor, Tensor]:
        given = x.clone().requires_grad_()
        y = model(given)
        y.square().sum().backward()
        assert given.grad is not None
        return y, given.grad

    return run


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", [(16, 1, 16), (1, 1), (1, 8), (8, 1)])
@pytest.mark.parametrize("tokens", [1, 9])
def test_a_layer_with_one_input_feature(mode: str, sizes: tuple[int, ...], tokens: int) -> None:
    """Time and value embeddings and bottlenecks of one get the right input gradient."""
    x = torch.randn(tokens, sizes[0], generator=torch.Generator().manual_seed(2))
    compare(lambda: toy(*sizes), outputs_and_gradients(x), mode, 5e-2)


def train(project: Path, *arguments: str, source: str = "text.txt", **changes: str) -> Result:
    """``ciphertune train`` on the project with another source, and other parts of its file. Errors are raised."""
    file = project / "run.toml"
    text = file.read_text().replace('"text.txt"', json.dumps(source))
    for old, new in changes.items():
        text = text.replace(f"\n{old} = ", f"\n{old} = {new} # ")
    file.write_text(text)
    given = ["train", str(file), *arguments]
    return CliRunner().invoke(cli, given, catch_exceptions=False, standalone_mode=False)


IDS = torch.randint(3, 48, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mode", MODES)
def test_an_evaluation_under_inference_mode_between_training_steps(mode: str, tiny: Callable[[str], Any]) -> None:
    results = []
    for outsourced in (False, True):
        base = tiny("llama")
        model = with_adapter(ciphertune.outsource(base, to=mode) if outsourced else base)
        with torch.inference_mode():
            before = model(input_ids=IDS).logits.clone()
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        with torch.no_grad():
            after = model(input_ids=IDS).logits
        results.append((before, gradient, after))
    for got, want in zip(results[1], results[0], strict=True):
        assert error(got, want) < 6e-2


@pytest.mark.parametrize(("count", "share"), [(100, 0.1), (100, 0.4), (100, 0.7), (10, 0.35), (100, 0.02), (3, 0.1)])
def test_the_share_that_is_held_out(count: int, share: float) -> None:
    texts = [str(number) for number in range(count)]
    train, held = split(texts, share)
    assert sorted([*train, *held]) == sorted(texts)
    assert abs(len(held) - share * count) <= max(1.0, 0.1 * share * count)
    assert train
    assert held


class AddsEnds:
    """A tokenizer that adds both tokens itself."""

    eos_token_id = 2

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1, *(ord(letter) % 90 + 3 for letter in text), 2]}


def test_a_tokenizer_that_adds_the_end_token() -> None:
    ids = rows_of(["ab", "cd", "ef"], AddsEnds(), 3).flatten().tolist()
    assert ids == [1, 10, 11, 2, 1, 12, 13, 2, 1, 14, 15, 2]


def test_json_lines_saved_on_windows_train(project: Path) -> None:
    lines = "\r\n".join(json.dumps({"text": "the quick brown fox " * 20}) for _ in range(4)) + "\r\n\r\n"
    (project / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert train(project, source="a.jsonl").exit_code == 0
    assert (project / "out" / "adapter" / "adapter_model.safetensors").exists()


def test_half_of_an_emoji_in_json_lines(project: Path) -> None:
    (project / "a.jsonl").write_text('{"text": "whole"}\n{"text": "cut \\ud83d here"}\n')
    with pytest.raises(ConfigError, match="line 2 of"):
        train(project, source="a.jsonl")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda w: w[0].zero_(), id="a zero row"),
        pytest.param(lambda w: w.zero_(), id="all zero"),
        pytest.param(lambda w: w.mul_(1e-42), id="subnormal"),
        pytest.param(lambda w: w[1].mul_(1e-42), id="one subnormal row"),
        pytest.param(lambda w: w.mul_(1e-30), id="1e-30"),
        pytest.param(lambda w: w.mul_(1e30), id="1e+30"),
    ],
)
@pytest.mark.parametrize("mode", [*MODES, "mlwe?weight_bits=16"])
def test_zero_and_tiny_weights(mode: str, change: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
    plain = toy(16, 8)
    with torch.no_grad():
        change(plain[0].weight)  # type: ignore[arg-type]
        plain[0].bias.zero_()
    weight = plain[0].weight.detach().clone()
    model = ciphertune.outsource(plain, to=mode, layers="all")
    given = x.clone().requires_grad_()
    y = model(given)
    y.sum().backward()
    assert given.grad is not None
    # Relative to the weight, so that of a zero weight zeros come out, to the last bit forward.
    assert (y.detach() - x @ weight.t()).norm() <= 2e-2 * (x @ weight.t()).norm() + 1e-42
    assert (y.detach()[:, (weight == 0).all(1)] == 0).all()
    want = weight.sum(0).expand_as(x)
    assert (given.grad - want).norm() <= 3e-2 * weight.norm() * len(x) + 1e-20
    ciphertune.session_of(model).close()


def test_a_model_folder_with_an_adapter_in_it(project: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(project / "model")
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(project / "model")
    for in_memory in (False, True):
        with pytest.raises(ConfigError, match=r"holds an adapter .* merge it"):
            ciphertune.split(str(project / "model"), project / "bundle", in_memory=in_memory)
    assert not (project / "bundle").exists()
    with pytest.raises(ConfigError, match=r"holds an adapter .* merge it"):
        train(project)


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "RemBert"])
def test_an_encoder_is_not_trained_as_a_causal_language_model(project: Path, kind: str) -> None:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=97, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=64,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(project / "model")
    with pytest.raises(ConfigError, match=rf"is an encoder: in {kind}\w+ .* causal language models"):
        train(project)


def test_a_classifier_is_not_trained_with_a_random_head(project: Path) -> None:
    from transformers import AutoConfig, LlamaForSequenceClassification

    LlamaForSequenceClassification(AutoConfig.from_pretrained(project / "model")).save_pretrained(project / "model")
    with pytest.raises(ConfigError, match=r"lacks 1 tensors of a LlamaForCausalLM, 'lm_head.weight'"):
        train(project)


def said(arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that fails, with status 1 or 2."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code in (1, 2)
    return capsys.readouterr().err


@pytest.mark.parametrize("key", ["output", "checkpoint_dir"])
@pytest.mark.parametrize("place", ["a file", "nowhere"])
def test_a_place_for_results_is_checked_first(project: Path, key: str, place: str) -> None:
    (project / "file").write_text("a file stands here")
    where = project / "file" if place == "a file" else Path("/proc/nowhere/out")
    (project / "model" / "config.json").unlink()  # not looked at
    with pytest.raises(ConfigError, match=rf"training\.{key}: cannot write to {where}: \w+"):
        train(project, **{key: json.dumps(str(where))})


@pytest.mark.parametrize("targets", [["c_attn"], ["q_proj", "c_attn"]])
def test_target_modules_of_another_model(project: Path, targets: list[str]) -> None:
    file = project / "run.toml"
    file.write_text(f"{file.read_text()}\n[lora]\ntarget_modules = {json.dumps(targets)}\n")
    with pytest.raises(ConfigError, match=r"no layer is called 'c_attn'; .*Known: .*down_proj.*q_proj"):
        train(project)


def test_a_length_beyond_the_model(project: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.length is 65, and the model takes 64 tokens at most"):
        train(project, length="65")


@pytest.mark.slow
def test_streams_that_take_ascii_alone() -> None:
    # As PYTHONIOENCODING=ascii makes them.
    code = """
        import sys
        sys.stdout.reconfigure(encoding="ascii", errors="strict")
        sys.stderr.reconfigure(encoding="ascii", errors="backslashreplace")
        import ciphertune.cli

        for command in (["backends"], ["plan", "llama-3-8b", "--no-measure"], ["train", "--help"]):
            try:
                ciphertune.cli.main(command)
            except SystemExit as end:
                assert not end.code, command
            print("ended", flush=True)
    """
    done = warm.run(textwrap.dedent(code), preload=warm.CLIENT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ended\n") == 3
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["a+b", "a b", "100%25", "a&b", "a#b", "k,l", "~", "caf\u00e9"])
def test_the_selection_that_keys_prints(tmp_path: Path, name: str) -> None:
    from ciphertune_zmq.address import parse
    from ciphertune_zmq.security import client_curve

    done = CliRunner().invoke(cli, ["keys", str(tmp_path / name)], catch_exceptions=False)
    selection = next(line for line in done.stdout.splitlines() if line.startswith("Client: ")).removeprefix("Client: ")
    options = choose(selection).transport.options
    assert options.curve == str(tmp_path / name)
    assert client_curve(parse("127.0.0.1:5555"), options) is not None


def test_the_home_folder_in_a_selection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ciphertune.key_files import keys_folder
    from ciphertune_zmq.address import parse
    from ciphertune_zmq.security import client_curve

    monkeypatch.setenv("HOME", str(tmp_path))
    assert keys_folder("~/keys") == tmp_path / "keys"
    CliRunner().invoke(cli, ["keys", str(tmp_path / "keys")], catch_exceptions=False)
    for option in ("~/keys", str(tmp_path / "keys")):
        options = choose(f"mlwe+zmq://127.0.0.1:5555?curve={option}").transport.options
        assert client_curve(parse("127.0.0.1:5555"), options) is not None


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take other lengths")
@pytest.mark.parametrize("length", [99, 100, 107])
def test_a_long_path_of_a_unix_socket(length: int) -> None:
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        path = f"{folder}/{'x y'}".ljust(length, "x")
        store = WeightStore.of({"0": quantize(toy(8, 8)[0].weight, 8)})  # type: ignore[arg-type]
        service = Service(Worker(store))
        listener = registry.load(registry.TRANSPORTS, "zmq").listen(service, f"ipc://{path}", {})
        try:
            model = ciphertune.outsource(toy(8, 8), to=f"mlwe+zmq://ipc://{path}", layers="all")
            assert model(torch.ones(2, 8)).shape == (2, 8)
            ciphertune.session_of(model).close()
        finally:
            listener.close()
            service.close()
        with pytest.raises(SelectionError, match="takes 107 bytes, not 108"):
            ciphertune.outsource(toy(8, 8), to=f"mlwe+zmq://ipc://{path.ljust(108, 'x')}", layers="all")


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="this system limits no files")
@pytest.mark.parametrize("limit", [3000, 30000])
def test_a_disk_that_fills_up(project: Path, limit: int, capsys: pytest.CaptureFixture[str]) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        text = said(["train", project / "run.toml"], capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot be written" in text
    assert not list((project / "ck").iterdir())
    assert not (project / "out" / "adapter").exists()


def test_mistakes_on_the_command_line(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    d = project
    good = d / "run.toml"
    (d / "empty.toml").write_text("")
    (d / "latin.toml").write_bytes(good.read_bytes() + "# caf\u00e9".encode("latin-1"))
    for folder in ("folder", "taken", "notmodel"):
        (d / folder).mkdir()
    (d / "taken" / "x").write_text("x")
    (d / "notmodel" / "config.json").write_text("{not json")
    for folder, change in {
        "broken": lambda name, data: data[: len(data) // 2] if name.endswith(".safetensors") else data,
        "unknown": lambda name, data: data.replace(b'"llama"', b'"nosuch"').replace(b"LlamaFor", b"NoSuchFor"),
    }.items():
        (d / folder).mkdir()
        for file in (d / "model").iterdir():
            (d / folder / file.name).write_bytes(change(file.name, file.read_bytes()))
        (d / f"{folder}.toml").write_text(good.read_text().replace('"model"', f'"{folder}"'))
    ciphertune.split(str(d / "model"), d / "bundle")
    for arguments in (
        ("train", d / "empty.toml"), ("train", d / "latin.toml"), ("train", d / "folder"),
        ("train", good, "--to", "mlwe?bits=3"), ("train", good, "--to", "mlwe+zmq://"),
        ("train", good, "--compare", d / "nowhere.json"), ("train", d / "broken.toml"), ("train", d / "unknown.toml"),
        ("split", d / "model", d / "taken"), ("split", d / "notmodel", d / "o1"), ("split", d / "broken", d / "o2"),
        ("split", d / "unknown", d / "o3"), ("split", d / "model", "/proc/nowhere"), ("plan", d / "notmodel"),
        ("worker", d / "folder"), ("keys", "/proc/nowhere"),
        ("worker", d / "bundle" / "worker", "--insecure", "--bind", "tcp://127.0.0.1:0", "--metrics-port", "1",
         "--metrics-host", "203.0.113.1"),
    ):  # fmt: skip
        assert said(arguments, capsys).strip(), arguments


def test_a_folder_that_is_no_model_says_what_it_lacks(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    d, text = project, (project / "run.toml").read_text()
    ciphertune.split(str(d / "model"), d / "bundle")
    (d / "empty").mkdir()
    changes: dict[str, tuple[Callable[[Path], bool], str]] = {
        "weightless": (lambda file: file.suffix == ".safetensors", "no weights"),
        "tokenless": (lambda file: file.name.startswith("tokenizer"), "no tokenizer"),
    }
    for name, (left_out, _) in changes.items():
        shutil.copytree(d / "model", d / name)
        for file in filter(left_out, list((d / name).iterdir())):
            file.unlink()
    shutil.copytree(d / "model", d / "cut")
    (d / "cut" / "config.json").write_text('{"archi')
    wrong = {
        "empty": "no config.json and holds nothing",
        "cut": "config.json is cut off or is no JSON",
        "bundle": "name '.*client'",
        "bundle/worker": "is a worker's part of a bundle",
        "run.toml": "is a file",
        **{name: words for name, (_, words) in changes.items()},
    }
    for name, words in wrong.items():
        (d / "wrong.toml").write_text(text.replace('"model"', json.dumps(name)))
        said_of: set[tuple[object, ...]] = {("train", d / "wrong.toml")}
        if name != "tokenless":
            said_of.add(("split", d / name, d / "split"))
        if name not in ("tokenless", "weightless", "run.toml"):
            said_of.add(("plan", d / name))
        for arguments in said_of:
            assert re.search(words, said(arguments, capsys)), arguments
    for name, words in {"": "name .*worker", "client": "a worker's is needed", "../model": "split it first"}.items():
        assert re.search(words, said(("worker", d / "bundle" / name), capsys))


def test_a_worker_looks_at_keys_and_ports_before_it_reads_weights(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ciphertune.split(str(project / "model"), project / "bundle")
    for file in (project / "bundle" / "worker").rglob("*.safetensors"):
        file.write_bytes(b"not looked at")
    serve = ("worker", project / "bundle" / "worker")
    plain = ("--bind", "tcp://127.0.0.1:0", "--insecure")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, words in {
            ("--curve", project): "worker.key is missing",
            ("--bind", "here"): "cannot read the address",
            ("--bind", f"tcp://127.0.0.1:{port}", "--insecure"): "cannot listen",
            (*plain, "--metrics-port", port): "cannot serve metrics",
            plain: "is damaged",
        }.items():
            assert words in said((*serve, *arguments), capsys)


def test_what_can_be_found_before_the_model_is_loaded(project: Path) -> None:
    for file in (project / "model").glob("*.safetensors"):
        file.write_bytes(b"not looked at")
    for arguments, changes, words in (
        (("--resume",), {}, "there is no checkpoint in .*: leave out --resume"),
        ((), {"length": "65"}, "the model takes 64 tokens at most"),
        (("--to", f"mlwe+zmq://10.0.0.5:5555?curve={project}"), {}, "client.key is missing"),
        (("--to", "mlwe+zmq://10.0.0.5"), {}, "cannot read the address"),
        (("--to", "mlwe?bits=3"), {}, "bits"),
    ):
        before = (project / "run.toml").read_text()
        with pytest.raises(CipherTuneError, match=words):
            train(project, *arguments, **changes)
        (project / "run.toml").write_text(before)


class Signals:
    """Sends signals to its own process after a step."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers

    @hookimpl
    def ciphertune_training_step(self, step: int) -> None:
        for number in self.numbers if step == 2 else ():
            os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_ended_by_a_signal_prints_the_command_that_goes_on(project: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    plugin_manager().register(sender := Signals(number))
    try:
        done = train(project, "--plugin", "traffic")
    finally:
        plugin_manager().unregister(sender)
    assert signal.getsignal(number) is before
    assert done.return_value == 128 + number
    go_on = f"ciphertune train {project / 'run.toml'} --plugin traffic --resume"
    assert f"checkpoint-2 is kept. Go on with: {go_on}\n" in done.stderr
    assert "stopped after step 2 of 8" in done.stderr
    assert not (project / "out" / "result.json").exists()
    assert train(project, "--resume").return_value is None
    assert len(json.loads((project / "out" / "result.json").read_text())["losses"]) == 8
    assert {(project / "out" / name).stat().st_mode & 0o777 for name in ("result.json", "report.html", "loss.png")} == {
        0o600
    }


def test_a_second_signal_ends_a_run_at_once(project: Path, interruptible: None) -> None:
    plugin_manager().register(sender := Signals(signal.SIGTERM, signal.SIGTERM))
    try:
        with pytest.raises((KeyboardInterrupt, click.Abort)):
            train(project, checkpoint_every="1")
    finally:
        plugin_manager().unregister(sender)
    assert [path.name for path in (project / "ck").iterdir()] == ["checkpoint-1"]


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(48, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mode", ["clear", "simulation", "simulation?of=concrete-glwe"])
def test_a_run_resumed_with_a_loader_that_shuffles(
    mode: str, workers: int, tiny: Callable[[str], Any], tmp_path: Path
) -> None:
    def run(folder: str, steps: int, resume: bool) -> list[float]:
        torch.manual_seed(3)
        model = ciphertune.outsource(tiny("llama"), to=mode)
        model = add_lora(model, seed=3, rank=2, targets=["q_proj", "v_proj"], lora_dropout=0.2)
        data = torch.utils.data.DataLoader(
            Rows(), batch_size=2, shuffle=True, num_workers=workers, persistent_workers=workers > 0
        )
        torch.manual_seed(9)
        trainer = ciphertune.LoraTrainer(
            model, learning_rate=1e-2, steps=steps, checkpoint_dir=tmp_path / folder, checkpoint_every=4
        )
        return trainer.train(data, resume=resume).losses

    whole = run("whole", 8, False)
    run("cut", 4, False)
    assert run("cut", 8, True) == whole
