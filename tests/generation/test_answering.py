"""Answers of an outsourced model are those of the model in the clear, whatever generates them, and are counted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import small
import tiny
import torch
from farm import Farm, Host
from torch import nn

import ciphertune
from ciphertune._support.denormals import flushes
from ciphertune.errors import ConfigError
from ciphertune.generation.answering import Costs, answer
from ciphertune.generation.drafting import load_draft
from ciphertune.generation.keeping import KeptCache
from ciphertune.generation.opening import OpenedModel, open_model
from ciphertune.generation.prompts import Prompt, encode, read_prompts
from ciphertune.generation.settings import GenerationSettings
from ciphertune.generation.source import ModelSource

pytest.importorskip("transformers")

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}
KINDS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny.llama(max_position_embeddings=64),
    "gpt2": lambda: tiny.gpt2(n_positions=64),
    "qwen2": lambda: small.model("Qwen2ForCausalLM", num_key_value_heads=2),
    "gemma2": lambda: small.model("Gemma2ForCausalLM", num_key_value_heads=2, head_dim=8, sliding_window=6),
}
WINDOWS = ("gemma2",)
"""Those of which a layer sees the last six tokens."""


def made(kind: str) -> Any:
    torch.manual_seed(11)
    model = KINDS[kind]().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def generated(model: Any, rows: int, **options: Any) -> torch.Tensor:
    ids = torch.randint(1, 48, (rows, 7), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    if rows > 1:
        ids[0, :3], mask[0, :3] = 0, 0
    found: torch.Tensor = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        **options,
    )
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_that_of_the_clear_model_for_every_way_to_generate(kind: str) -> None:
    plain = {name: generated(made(kind), 1, **options) for name, options in WAYS.items()}
    batch = generated(made(kind), 3)
    assisted = generated(made(kind), 1, assistant_model=made(kind))
    # Weights as workers have them under mlwe: rounding alone may change a text.
    for to in ("clear", "mlwe"):
        model = made(kind)
        if to == "mlwe":
            ciphertune.restore(ciphertune.outsource(model, "mlwe"))
            plain = {name: generated(model, 1, **options) for name, options in WAYS.items()}
            batch = generated(model, 3)
        ciphertune.outsource(model, to)
        session = ciphertune.session_of(model)
        for name, options in WAYS.items():
            sent = session.traffic.requests
            assert torch.equal(generated(model, 1, **options), plain[name]), (to, name)
            assert session.traffic.requests > sent
        assert torch.equal(generated(model, 3), batch), to
        if to == "clear":
            assert torch.equal(generated(model, 1, assistant_model=made(kind)), assisted)
        session.close()


@pytest.fixture(scope="module")
def opened(folder: Path) -> Iterator[OpenedModel]:
    with open_model(ModelSource(str(folder), to="clear")) as found:
        yield found


def ids(opened: OpenedModel, *texts: str) -> list[list[int]]:
    return [encode(opened, Prompt("a prompt", text)) for text in texts]


def test_padding_and_a_fixed_length_hide_counts_and_change_no_text(opened: OpenedModel) -> None:
    prompts = ids(opened, "hello there", "a", "some more of it")
    alone = [answer(opened, [prompt], GenerationSettings(max_new_tokens=8))[0][0].text for prompt in prompts]
    together, plain = answer(opened, prompts, GenerationSettings(max_new_tokens=8))
    padded, cost = answer(opened, prompts, GenerationSettings(max_new_tokens=8, pad_tokens=16))
    assert [each.text for each in together] == [each.text for each in padded] == alone
    assert cost.prompt_bytes_up * 15 == plain.prompt_bytes_up * 16
    assert cost.bytes_up == plain.bytes_up
    # The answer ends where a token is that the model is told to end at.
    second = opened.tokenizer(alone[0].replace(" ", ""))["input_ids"][2]
    before = opened.model.generation_config.eos_token_id
    opened.model.generation_config.eos_token_id = second
    try:
        pieces: list[str] = []
        short, few = answer(opened, prompts[:1], GenerationSettings(max_new_tokens=8))
        fixed, all_of_it = answer(
            opened, prompts[:1], GenerationSettings(max_new_tokens=8, fixed_length=True), on_text=pieces.append
        )
    finally:
        opened.model.generation_config.eos_token_id = before
    assert short == fixed
    assert short[0].finish == "stop"
    assert "".join(pieces) == fixed[0].text
    assert (few.passes, all_of_it.passes) == (short[0].new_tokens - 1, 7)


def test_costs_are_of_the_new_tokens(opened: OpenedModel) -> None:
    prompts = ids(opened, "hello there")
    before = opened.session.traffic.bytes_up
    found, costs = answer(opened, prompts, GenerationSettings(max_new_tokens=5))
    assert (found[0].new_tokens, found[0].finish, costs.new_tokens, costs.passes) == (5, "length", 5, 4)
    # The pass of a prompt of eleven tokens, then one for each new token but the last.
    assert costs.prompt_bytes_up / 11 == costs.bytes_up / 4
    assert costs.prompt_bytes_up + costs.bytes_up == opened.session.traffic.bytes_up - before
    assert costs.tokens_per_second == pytest.approx(4 / costs.seconds)
    total = Costs()
    total.add(costs)
    total.add(costs)
    assert total.new_tokens == 10
    assert total.tokens_per_second == pytest.approx(costs.tokens_per_second)


class Numbers:
    """A tokenizer whose texts are numbers of tokens."""

    pad_token_id, eos_token_id = 0, None

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


class Bare:
    """What ``answer`` asks of an opened model."""

    def __init__(self, model: Any) -> None:
        model.generation_config.eos_token_id = None
        self.model, self.session, self.tokenizer = model, ciphertune.session_of(model), Numbers()
        self.positions, self.vocabulary = 64, 96


@pytest.mark.parametrize("to", ["clear", "mlwe"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_sends_new_tokens_alone_and_says_the_same(kind: str, to: str) -> None:
    opened: Any = Bare(ciphertune.outsource(made(kind), to))
    kept, settings = KeptCache(opened.model), GenerationSettings(max_new_tokens=5)
    text, held = [], 0
    # What was said comes back with new tokens behind it, its end written in another way.
    for cut, new in [(0, [7, 8, 9, 10]), (0, [3, 4]), (3, [5]), (6, [40, 41, 42]), (1, [6])]:
        text = text[: len(text) - cut] + new
        (said,), few = answer(opened, [text], settings, kept=kept)
        (plain,), all_of_it = answer(opened, [text], settings)
        assert said == plain
        assert few.bytes_up == all_of_it.bytes_up
        same = min(held, len(text) - len(new))
        if same < held and kind in WINDOWS:
            same = 0  # Its layers have lost what came before the window.
        assert few.prompt_bytes_up * len(text) == all_of_it.prompt_bytes_up * (len(text) - same)
        text += map(int, said.text.split())
        held = len(text) - 1
        assert kept.tokens == held
    kept.drop()
    (_,), dropped = answer(opened, [text], settings, kept=kept)
    assert dropped.prompt_bytes_up > few.prompt_bytes_up
    opened.session.close()


def test_nothing_is_kept_where_it_could_change_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: Any = Bare(ciphertune.outsource(made("llama"), "clear"))
    kept, text = KeptCache(opened.model), [7, 8, 9, 10]
    ways: list[dict[str, Any]] = [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}, {"pad_tokens": 4}]
    for options in ways:
        answer(opened, [text], GenerationSettings(max_new_tokens=3), kept=kept)
        assert kept.tokens == 6
        answer(opened, [text], GenerationSettings(max_new_tokens=3, **options), kept=kept)
        assert kept.tokens == 0
    answer(opened, [text], GenerationSettings(max_new_tokens=3), kept=kept)
    with monkeypatch.context() as patched:
        # A pass that fails leaves some layers with tokens that others have not.
        patched.setattr(opened.model.lm_head, "forward", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            answer(opened, [text], GenerationSettings(max_new_tokens=3), kept=kept)
    assert kept.tokens == 0
    opened.session.close()
    moving = tiny.llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    recurrent = small.model("MambaForCausalLM", state_size=4)
    for model in (moving, recurrent):
        assert KeptCache(model).take(text) == {}


def test_pieces_are_the_text_and_an_answer_can_be_stopped(opened: OpenedModel, folder: Path) -> None:
    prompts = ids(opened, "hello there")
    pieces: list[str] = []
    stop = threading.Event()
    found, _ = answer(opened, prompts, GenerationSettings(max_new_tokens=9), on_text=pieces.append)
    assert "".join(pieces) == found[0].text
    assert len(pieces) > 3
    stopped, _ = answer(
        opened, prompts, GenerationSettings(max_new_tokens=9), on_text=lambda text: stop.set(), stop=stop
    )
    assert (stopped[0].finish, found[0].text.startswith(stopped[0].text)) == ("interrupted", True)
    assert stopped[0].new_tokens < 9
    guessed, costs = answer(
        opened, prompts, GenerationSettings(max_new_tokens=9), draft=load_draft(opened, str(folder))
    )
    assert guessed[0].text == found[0].text
    assert costs.passes < 8
    drawn = [answer(opened, prompts, GenerationSettings(max_new_tokens=9, temperature=2.0, seed=s)) for s in (1, 1, 2)]
    assert drawn[0][0] == drawn[1][0] != drawn[2][0]


def test_denormals_are_zeros_between_products_too(opened: OpenedModel) -> None:
    before, seen = flushes(), []
    torch.set_flush_denormal(False)
    try:
        answer(
            opened, ids(opened, "hello"), GenerationSettings(max_new_tokens=4), on_text=lambda _: seen.append(flushes())
        )
        assert seen
        assert all(seen)
        assert not flushes()
    finally:
        torch.set_flush_denormal(before)


def test_what_does_not_fit_is_refused_before_anything_is_sent(opened: OpenedModel, tmp_path: Path) -> None:
    requests = opened.session.traffic.requests
    for text, why in (("", "is empty"), ("x" * 600, "600 tokens, and the model takes 512")):
        with pytest.raises(ConfigError, match=why):
            ids(opened, text)
    with pytest.raises(ConfigError, match="fills 512 tokens"):
        answer(opened, ids(opened, "x" * 500), GenerationSettings(pad_tokens=512))
    with pytest.raises(ConfigError, match="token 97"):
        answer(opened, [[1, 97]], GenerationSettings())
    with pytest.raises(ConfigError, match="one prompt at a time"):
        answer(opened, [[1], [2]], GenerationSettings(prompt_lookup_num_tokens=2))
    with pytest.raises(ConfigError, match="fixed_length"):
        answer(opened, [[1]], GenerationSettings(fixed_length=True), draft=opened.model)
    template, opened.tokenizer.chat_template = opened.tokenizer.chat_template, None
    try:
        with pytest.raises(ConfigError, match="no chat template"):
            encode(opened, Prompt("x", [{"role": "user", "content": "hi"}]))
    finally:
        opened.tokenizer.chat_template = template
    tiny.llama().save_pretrained(tmp_path)
    tiny.save_words(tmp_path)
    with pytest.raises(ConfigError, match="other tokens"):
        load_draft(opened, str(tmp_path))
    assert opened.session.traffic.requests == requests


@pytest.mark.parametrize(
    "values",
    [
        {"max_new_tokens": 0},
        {"temperature": 0.0},
        {"top_p": 1.5},
        {"temperature": 1.0, "do_sample": False},
        {"num_beams": 2, "prompt_lookup_num_tokens": 2},
        {"num_beams": 2, "fixed_length": True},
        {"prompt_lookup_num_tokens": 2, "fixed_length": True},
    ],
)
def test_settings_that_make_no_sense(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        GenerationSettings(**values)


def test_prompts_from_files(tmp_path: Path) -> None:
    text = tmp_path / "prompts.txt"
    text.write_text("one\n\n two\n", encoding="utf-8")
    assert [each.content for each in read_prompts(text)] == ["one", " two"]
    rows = tmp_path / "prompts.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    lines = [
        '{"prompt": "one", "completion": "1"}',
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
        '{"instruction": "do", "input": "this", "output": "x"}',
    ]
    rows.write_text("\n".join(lines), encoding="utf-8")
    asked = [{"role": "user", "content": "do\n\nthis"}]
    assert [each.content for each in read_prompts(rows)] == ["one", turns[:1], asked]
    rows.write_text('{"secret": "s3cret"}', encoding="utf-8")
    with pytest.raises(ConfigError, match="line 1 of") as refused:
        read_prompts(rows)
    assert "s3cret" not in str(refused.value)
    rows.write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="no prompt"):
        read_prompts(rows)
    with pytest.raises(ConfigError, match="cannot read"):
        read_prompts(tmp_path / "gone.txt")


@pytest.mark.parametrize("backend", ["clear", "mlwe"])
def test_a_worker_lost_in_the_middle_of_an_answer(backend: str, farm: Farm) -> None:
    parts = (("self_attn", "q_proj", "k_proj", "v_proj"), ("self_attn", "o_proj"), ("mlp", "gate_proj", "up_proj"))
    blocks = [
        [f"model.layers.{layer}.{place}.{name}" for name in names]
        for layer in range(2)
        for place, *names in (*parts, ("mlp", "down_proj"))
    ]
    farm.plant(made("llama"), backend, one=[*blocks, ["lm_head"]], two=[*blocks, ["lm_head"]])
    model = made("llama")
    farm.outsource(model, backend)
    expected = generated(model, 1)
    first: Host = farm.hosts["one"]
    count = 0

    def lost(request: Any) -> Any:
        nonlocal count
        count += request.kind == "evaluate"
        if count == 20:
            return first.crash()
        return first.answer(request)

    first.script = lost
    assert torch.equal(generated(model, 1), expected)
    assert not first.up
