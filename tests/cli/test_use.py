"""The commands that use a model: generate, chat, eval."""

from __future__ import annotations

import json
import signal
import stat
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from click.testing import CliRunner, Result

from ciphertune.cli import cli
from ciphertune.errors import CipherTuneError, ConfigError
from ciphertune.generation import conversation
from ciphertune.generation.answering import answer
from ciphertune.generation.conversation import Conversation, stoppable
from ciphertune.generation.opening import open_model
from ciphertune.generation.settings import GenerationSettings
from ciphertune.generation.source import ModelSource

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    tiny.save_talker(made)
    return made


def invoke(*args: object, said: str | None = None) -> Result:
    return CliRunner().invoke(cli, [str(each) for each in args], input=said, catch_exceptions=False)


def test_generate(folder: Path, tmp_path: Path) -> None:
    alone = json.loads(invoke("generate", folder, "hello", "--to", "clear", "--max-new-tokens", 5, "--json").stdout)
    assert {"text", "new_tokens", "seconds", "tokens_per_second", "bytes_up", "bytes_down"} <= set(alone)
    assert alone["new_tokens"] == 5
    assert alone["answers"][0]["text"] == alone["text"]
    file = tmp_path / "prompts.txt"
    file.write_text("hello\nanother one\n", encoding="utf-8")
    both = json.loads(
        invoke("generate", folder, "--file", file, "--to", "clear", "--max-new-tokens", 5, "--json").stdout
    )
    assert both["text"][0] == alone["text"]
    assert both["new_tokens"] == 10
    text = invoke("generate", folder, "hello", "--to", "clear", "--max-new-tokens", 5)
    assert text.stdout == alone["text"] + "\n"
    assert "5 new tokens" in text.stderr
    asked = invoke("generate", folder, "hello", "--chat", "--to", "clear", "--max-new-tokens", 5)
    assert asked.stdout != text.stdout
    for wrong in ([], [""], ["--file", tmp_path / "gone"], ["hello", "--top-p", "2"], ["x" * 600]):
        with pytest.raises(ConfigError):
            invoke("generate", folder, *wrong, "--to", "clear")


def test_chat(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "talk.jsonl"
    lines = [
        *("hi there", "!set max_new_tokens=4", "again", f"/save {place}", f"!save {place}", "/status", "!foo"),
        *(
            "/set colour=1",
            "x" * 600,
            "!clear",
            f"/save {tmp_path / 'empty'}",
            "!help",
            "!example count",
            "/exit",
            "no",
        ),
    ]
    result = invoke(
        "chat", folder, "--to", "clear", "--max-new-tokens", 6, "--system", "be kind", said="\n".join(lines)
    )
    turns = json.loads(place.read_text(encoding="utf-8"))["messages"]
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user", "assistant"]
    assert [turn["content"] for turn in turns[::2]] == ["be kind", turns[2]["content"], turns[4]["content"]]
    assert turns[2]["content"] in result.stdout
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    assert len(json.loads((tmp_path / "empty").read_text(encoding="utf-8"))["messages"]) == 1
    assert "max_new_tokens: 4" in result.stdout
    assert "there is no !foo" in result.stdout
    assert "no setting 'colour'" in result.stdout
    assert "the conversation has" in result.stdout
    assert "Count from one" in result.stdout
    # Another conversation does not write over it.
    said = invoke("chat", folder, "--to", "clear", said=f"/save {place}\n").stdout
    assert "exists already" in said
    assert len(json.loads(place.read_text(encoding="utf-8"))["messages"]) == 5


def test_ctrl_c_stops_an_answer_and_not_the_program(folder: Path) -> None:
    written: list[str] = []

    def write(text: str) -> None:
        written.append(text)
        if len(written) == 2:
            signal.raise_signal(signal.SIGINT)

    with open_model(ModelSource(str(folder), to="clear")) as opened:
        talk = Conversation(opened, GenerationSettings(max_new_tokens=60), write)
        assert talk.take("hi")
        assert "(interrupted)" in written[-1]
        written[:] = ["", ""]
        assert talk.take("hi")
        assert [turn["role"] for turn in talk.turns] == ["user", "assistant"] * 2
    with stoppable() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_an_answer_that_fails_leaves_the_conversation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    with open_model(ModelSource(str(folder), to="clear")) as opened:
        talk = Conversation(opened, GenerationSettings(max_new_tokens=2), written.append)
        talk.take("one")
        kept = list(talk.turns)

        def fail(*_: Any, **__: Any) -> None:
            raise CipherTuneError("the worker is gone")

        with monkeypatch.context() as patched:
            patched.setattr(conversation, "answer", fail)
            assert talk.take("two")
        assert written[-1] == "the worker is gone\n"
        assert talk.turns == kept


def test_a_turn_sends_what_is_new_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ("hi there", "and now", "!set max_new_tokens=3", "again", "/reset", "hi there")
    sent: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    turns: dict[bool, Any] = {}
    for kept in (True, False):

        def answered(*args: Any, keep: bool = kept, **options: Any) -> Any:
            found, costs = answer(*args, **{**options, "kept": options["kept"] if keep else None})
            sent[keep].append((costs.prompt_bytes_up, costs.prompt_tokens))
            return found, costs

        monkeypatch.setattr(conversation, "answer", answered)
        with open_model(ModelSource(str(folder), to="clear")) as opened:
            talk = Conversation(opened, GenerationSettings(max_new_tokens=6), lambda _: None)
            told = []
            for line in lines:
                talk.take(line)
                told.append(list(talk.turns))
            turns[kept] = told
    assert turns[True] == turns[False]
    assert [tokens for _, tokens in sent[True]] == [tokens for _, tokens in sent[False]]
    each = sent[False][0][0] // sent[False][0][1]
    prompts = [tokens for _, tokens in sent[True]]
    # The template writes an answer's letters apart, as the tokenizer reads them: what was asked before is the same.
    assert [up // each for up, _ in sent[False]] == prompts
    first, second, third, again = (up // each for up, _ in sent[True])
    assert (first, again) == (prompts[0], prompts[0])
    assert second < prompts[1] - prompts[0] + 6
    assert third < prompts[2] - prompts[1] + 6


def test_eval(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "held.jsonl"
    data.write_text('{"text": "some text of letters"}\n{"text": "and some more"}\n', encoding="utf-8")
    found = json.loads(
        invoke("eval", folder, "--to", "clear", "--data", data, "--length", 8, "--pad-tokens", 8, "--json").stdout
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer("some text of letters")["input_ids"] + [96], tokenizer("and some more")["input_ids"] + [96]]
    rows = torch.tensor([*ids[0], *ids[1]])[: 8 * (sum(map(len, ids)) // 8)].view(-1, 8)
    with torch.no_grad():
        loss = float(model(rows, labels=rows).loss)
    assert found["loss"] == pytest.approx(loss, rel=1e-4)
    assert found["perplexity"] == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-3)
    assert found["tokens"] == rows.numel() - len(rows)
    short = json.loads(invoke("eval", folder, "--to", "clear", "--data", data, "--length", 100, "--json").stdout)
    assert short["tokens"] == sum(len(each) - 1 for each in ids)
    with pytest.raises(ConfigError, match="nothing to measure"):
        invoke("eval", folder, "--to", "clear")


def likelihood(model: Any, tokenizer: Any, question: str, choice: str) -> float:
    ids = tokenizer(f"{question} {choice}", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        scores = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return float(scores[len(question) - 1 :].sum())


def test_eval_of_choices(folder: Path, tmp_path: Path) -> None:
    choices = ["a", "much longer", "b c"]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    scores = [likelihood(model, tokenizer, "why", choice) for choice in choices]
    plain = scores.index(max(scores))
    by_length = [score / len(choice) for score, choice in zip(scores, choices, strict=True)]
    normed = by_length.index(max(by_length))
    file = tmp_path / "quiz.jsonl"

    def measure(*answers: object) -> dict[str, Any]:
        rows = [json.dumps({"question": "why", "choices": choices, "answer": each}) for each in answers]
        file.write_text("\n".join(rows), encoding="utf-8")
        found: dict[str, Any] = json.loads(invoke("eval", folder, "--to", "clear", "--choices", file, "--json").stdout)
        return found

    other = next(number for number in range(3) if number not in (plain, normed))
    found = measure(plain, "ABC"[plain].lower(), choices[plain], other)
    assert (found["questions"], found["accuracy"], found["loss"]) == (4, 0.75, None)
    assert measure(normed, other)["accuracy_norm"] == 0.5
    for wrong in (7, "Z", None, True):
        with pytest.raises(ConfigError, match="'answer'"):
            measure(wrong)
