"""Answers computed together are those of transformers' ``generate``, whoever joins and leaves."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

import ciphertune
from ciphertune.errors import ConfigError
from ciphertune.serving.decoding import Decoder

FILLER = 0
LENGTH = 6


class Line:
    """An answer that is greedy and has a length of its own, in the place of ``Answer``."""

    def __init__(self, prompt: list[int], length: int = LENGTH, caller: str = "ann") -> None:
        self.prompt, self.caller, self._length = prompt, caller, length
        self.tokens: list[int] = []
        self.cancelled = False

    @property
    def leaves(self) -> bool:
        return self.cancelled or len(self.tokens) >= self._length

    def take(self, logits: Tensor, filler: int) -> int:
        self.tokens.append(int(logits.argmax()))
        return self.tokens[-1]


def run(decoder: Any, *joining: list[Line]) -> list[int]:
    """Let answers join, a list of them before each step, and compute them all; how many there were at each step."""
    counts = []
    waiting = list(joining)
    while waiting or decoder.answers:
        if waiting and (lines := waiting.pop(0)):
            decoder.join(lines)
        decoder.step()
        counts.append(len(decoder.answers))
    return counts


def expected(model: Any, line: Line) -> list[int]:
    """What ``generate`` answers."""
    with torch.no_grad():
        found = model.generate(
            torch.tensor([line.prompt]), max_new_tokens=len(line.tokens), do_sample=False, eos_token_id=None
        )
    tokens: list[int] = found[0, len(line.prompt) :].tolist()
    return tokens


def mistral() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {key: getattr(tiny.llama_config(), key) for key in ("vocab_size", "hidden_size", "intermediate_size")}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=4))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": tiny.llama,
    "llama-tied": lambda: tiny.llama(tie_word_embeddings=True),
    "gpt2": lambda: tiny.gpt2(n_positions=64),
    "mistral-sliding": mistral,
}


def made(kind: str) -> Any:
    torch.manual_seed(5)
    model = MODELS[kind]().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("pad", [1, 8])
@pytest.mark.parametrize("kind", MODELS)
def test_answers_computed_together_are_those_of_generate(kind: str, pad: int) -> None:
    model = made(kind)
    lines = [Line([5, 9, 3]), Line([7]), Line([4, 4, 8, 1, 30, 2, 11], 2)]
    run(Decoder(model, FILLER, pad), lines)
    for line in lines:
        assert line.tokens[: line._length] == expected(model, line)[: line._length]


@settings(max_examples=15)
@given(
    st.lists(
        st.lists(st.builds(Line, st.lists(st.integers(1, 47), min_size=1, max_size=9), st.integers(1, 5)), max_size=2),
        min_size=1,
        max_size=6,
    )
)
def test_who_joins_and_leaves_changes_no_answer(joining: list[list[Line]]) -> None:
    model = made("llama")
    run(Decoder(model, FILLER), *joining)
    for line in [line for lines in joining for line in lines]:
        assert line.tokens == expected(model, line)


def test_who_is_gone_is_computed_no_more() -> None:
    decoder: Any = Decoder(made("llama"), FILLER)
    gone, stays = Line([1, 2, 3], 50), Line([4], 6)
    decoder.join([gone, stays])
    decoder.step()
    gone.cancelled = True
    decoder.step()
    assert decoder.answers == [stays]
    assert len(gone.tokens) == 2
    assert decoder._cache.layers[0].keys.shape[::2] == (1, 3), "padding of the longer prompt is gone with it"
    stays.cancelled = True
    decoder.step()
    assert decoder.answers == []


def test_nobody_joins_a_cache_that_rows_cannot_be_put_into() -> None:
    decoder: Any = Decoder(made("mistral-sliding"), FILLER)
    assert decoder.open
    decoder.join([Line([1, 2]), Line([3], 2)])
    assert not decoder.open
    assert run(decoder) == [2, 2, 2, 2, 2, 0], "they are computed to the end of the longest"
    assert decoder.open


def test_a_padded_prompt_is_sent_as_a_multiple() -> None:
    model = ciphertune.outsource(made("llama"), to="clear")
    sent: list[int] = []
    session = ciphertune.session_of(model)
    product = session.product

    def counted(group: int, direction: Any, x: Tensor, owners: Any = None, **known: Any) -> Tensor:
        sent.append(len(x))
        return product(group, direction, x, owners, **known)

    session.product = counted  # type: ignore[method-assign]
    decoder: Any = Decoder(model, FILLER, 16)
    decoder.join([Line([1, 2, 3]), Line([1])])
    assert set(sent) <= {32, 2}, "the head is asked for the last places alone"
    session.close()


class TestCallers:
    def test_rows_of_several_callers(self) -> None:
        plain = made("llama")
        model = ciphertune.outsource(made("llama"), to="simulation?of=mlwe")
        ciphertune.session_of(model).keep_apart()
        decoder: Any = Decoder(model, FILLER, apart=True)
        assert decoder.mixes
        lines = [Line([5, 9, 3], caller="ann"), Line([7], caller="bob"), Line([1, 2], caller="ann")]
        run(decoder, lines[:2], [], lines[2:])
        same = sum(line.tokens == expected(plain, line) for line in lines)
        assert same >= 1, "rounding may turn a token"
        ciphertune.session_of(model).close()

    def test_a_model_that_flattens_its_batch_is_asked_for_one_caller_at_a_time(self) -> None:
        model = made("llama")
        ciphertune.outsource(model, to="clear")
        session = ciphertune.session_of(model)
        session.keep_apart()
        layer = model.model.layers[0].mlp.gate_proj
        forward = layer.forward
        layer.forward = lambda x: forward(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)
        decoder: Any = Decoder(model, FILLER, apart=True)
        assert not decoder.mixes
        run(decoder, [Line([5, 9], caller="ann"), Line([5], caller="ann")])
        session.close()


def test_a_model_without_a_cache_is_refused() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny.llama()
            self.config = self.inner.config

        def forward(self, input_ids: Tensor) -> Tensor:
            raise NotImplementedError

    with pytest.raises(ConfigError, match="keeps no cache"):
        Decoder(Odd(), FILLER)
