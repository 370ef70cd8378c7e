"""``ciphertune serve`` as the page docs/serve.md says, in a process of its own; and with a worker that is lost."""

import contextlib
import io
import json
import os
import re
import select
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import peft
import pytest
import remote
import torch
import warm
from served_model import KEYS, SECRET, ask
from transformers import AutoModelForCausalLM, AutoTokenizer

import ciphertune
from ciphertune.serving.server import Server

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

PAGE = Path(__file__).parents[2] / "docs" / "serve.md"


def block(language: str, beginning: str) -> str:
    """The block of the page that begins so."""
    (found,) = [b for b in re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.M | re.S) if beginning in b]
    return str(found)


@contextlib.contextmanager
def served(*arguments: str, cwd: Path, log: Path, **environment: str) -> Iterator[str]:
    """The address of ``ciphertune serve``; it has to end well."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    with log.open("w") as errors:
        process = warm.start(["serve", *arguments, "--port", "0"], warm.CLIENT, stderr=errors, env=env, cwd=cwd)
    try:
        assert process.stdout is not None
        readable, _, _ = select.select([process.stdout], [], [], remote.START_SECONDS)
        line = process.stdout.readline() if readable else ""
        assert line.startswith("ready http://127.0.0.1:"), log.read_text()
        yield line.split()[1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert process.stdout.read() == ""
    finally:
        process.kill()
        process.wait(60)
        process.stdout.close()  # type: ignore[union-attr]


def save_adapter(folder: Path) -> None:
    """An adapter that changes what the model of the project says."""
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "model"), peft.LoraConfig(r=2, target_modules=["q_proj"])
    )
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder / "out" / "adapter")


def expected(folder: Path, text: str, tokens: int) -> str:
    """What the model answers with its adapter, by transformers and peft alone."""
    model = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder / "model"), folder / "out/adapter"
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found = model.generate(input_ids=ids, max_new_tokens=tokens, do_sample=False, eos_token_id=96, pad_token_id=96)
    answer: str = tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
    return answer


@pytest.mark.slow
def test_the_page(project: Path, tmp_path: Path) -> None:
    save_adapter(project)
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (project / "model" / "chat_template.jinja").write_text(template)
    log = tmp_path / "log"
    arguments = ["model", "--to", "clear", "--name", "mine", "--adapter", "out/adapter"]
    with served(*arguments, cwd=project, log=log) as address:
        printed = io.StringIO()
        names: dict[str, Any] = {}
        with contextlib.redirect_stdout(printed):
            exec(block("python", "OpenAI").replace("http://127.0.0.1:8000", address), names)
        whole, _, stream = printed.getvalue().partition("\n")
        assert whole == stream == expected(project, names["messages"][0]["content"], 40)
        names["client"].close()
        if shutil.which("curl"):
            models, chat = block("sh", "curl").replace("http://127.0.0.1:8000", address).strip().splitlines()
            run: Any = {"shell": True, "capture_output": True, "text": True, "check": True}
            assert json.loads(subprocess.run(models, **run).stdout)["data"][0]["id"] == "mine"
            events = subprocess.run(chat, **run).stdout.split("\n\n")
            assert events[-2] == "data: [DONE]"
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
            client.chat.completions.create(model="mine", messages=ask(SECRET), max_tokens=2)
            with pytest.raises(openai.BadRequestError):
                client.chat.completions.create(model="mine", messages=ask(SECRET * 20))
    assert SECRET not in log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--host", "0.0.0.0"], "give each caller an API key"),
        (["--api-key", "short"], "fewer than 16"),
        (["--api-key-file", "shared"], "chmod 600"),
        (["--certificate", "shared"], "both a certificate and its key"),
        (["--adapter", "nothing"], "nothing"),
        (["--layers", "none.*"], "none.*"),
    ],
)
def test_what_is_wrong_is_one_line(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], told: str
) -> None:
    from ciphertune.cli import main

    monkeypatch.chdir(project)
    (project / "shared").write_text(KEYS[0])
    (project / "shared").chmod(0o644)
    with pytest.raises(SystemExit) as caught:
        main(["serve", "model", "--to", "clear", "--port", "0", *arguments])
    assert caught.value.code == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert told in line


@pytest.mark.slow
def test_a_worker_that_is_lost_changes_no_text(
    letters: Callable[..., Any], serve: Callable[..., Server], client: Callable[..., openai.OpenAI], tmp_path: Path
) -> None:
    letters().save_pretrained(tmp_path / "model")
    ciphertune.split(str(tmp_path / "model"), tmp_path / "bundle")
    asked: Any = {"model": "tiny", "messages": ask("Hello"), "max_tokens": 24}
    with (
        remote.worker(tmp_path / "bundle" / "worker") as worker,
        remote.proxy(worker.address) as link,
    ):
        # Without an encryption, whose errors could turn a token.
        to = f"clear+zmq://{link.address}?insecure=1&weight_bits=8&allow_insecure=1"
        model = ciphertune.load_client(tmp_path / "bundle" / "client", to)
        create = client(serve(None, model)).chat.completions.create
        whole = create(**asked).choices[0].message.content
        texts = []
        for piece in create(**asked, stream=True):
            texts.append(piece.choices[0].delta.content or "")
            if len(texts) in (5, 12):
                link.cut()
        assert "".join(texts) == whole
        ciphertune.session_of(model).close()
