"""Plans of generation: round trips and bytes of a pass are what a session counts."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import ciphertune
from ciphertune.cli import cli
from ciphertune.errors import ConfigError
from ciphertune.planning.generating import plan_generation
from ciphertune.traffic import Traffic

Tiny = Callable[[str], nn.Module]


def counted(model: Any, ids: torch.Tensor, new: int, **options: Any) -> list[Traffic]:
    """What each pass of a generation sent."""
    session = ciphertune.session_of(model)
    passes: list[Traffic] = []
    forward = model.forward

    @functools.wraps(forward)  # generate asks which arguments it takes
    def watched(*args: Any, **options: Any) -> Any:
        before = copy.copy(session.traffic)
        answer = forward(*args, **options)
        passes.append(session.traffic.since(before))
        return answer

    model.forward = watched
    torch.manual_seed(0)
    model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, **options)
    model.forward = forward
    return passes


@pytest.mark.parametrize("to", ["clear", "simulation?seed=1", "mlwe", "mlwe?share_inputs=0"])
@pytest.mark.parametrize("sequences", [1, 3])
def test_passes_send_what_was_planned(to: str, sequences: int, tiny: Tiny, tmp_path: Path) -> None:
    model: Any = tiny("llama")
    model.save_pretrained(tmp_path / "model")
    found = plan_generation(str(tmp_path / "model"), to, sequences=sequences, prompt_tokens=5, measure=False)
    first, *later = counted(
        ciphertune.outsource(model, to), torch.arange(1, 1 + 5 * sequences).reshape(sequences, 5), 4
    )
    assert (first.requests, first.bytes_up, first.bytes_down) == (
        found.requests,
        found.prompt_bytes_up,
        found.prompt_bytes_down,
    )
    assert len(later) == 3
    for each in later:
        assert (each.requests, each.bytes_up, each.bytes_down) == (found.requests, found.bytes_up, found.bytes_down)
    assert found.bytes_per_token == (found.bytes_up + found.bytes_down) / sequences


@pytest.mark.parametrize("embeddings", [False, True])
def test_a_head_gets_the_last_token_of_a_prompt_alone(embeddings: bool, tiny: Tiny, tmp_path: Path) -> None:
    model: Any = tiny("llama")
    model.save_pretrained(tmp_path / "model")
    asked: dict[str, Any] = {"layers": "all", "embeddings": embeddings}
    found = plan_generation(str(tmp_path / "model"), **asked, sequences=2, prompt_tokens=5, measure=False)
    first, later = counted(ciphertune.outsource(model, "mlwe", **asked), torch.arange(1, 11).reshape(2, 5), 2)
    assert (first.bytes_up, first.bytes_down) == (found.prompt_bytes_up, found.prompt_bytes_down)
    assert (later.requests, later.bytes_up, later.bytes_down) == (found.requests, found.bytes_up, found.bytes_down)


def test_a_pass_over_drafted_tokens_sends_what_was_planned(tiny: Tiny, tmp_path: Path) -> None:
    model: Any = tiny("llama")
    model.save_pretrained(tmp_path / "model")
    found = plan_generation(str(tmp_path / "model"), drafted=3, accepted=2.5, measure=False)
    outsourced: Any = ciphertune.outsource(model, "mlwe")
    session = ciphertune.session_of(outsourced)
    with torch.no_grad():
        outsourced(torch.arange(1, 5)[None])
    assert (session.traffic.requests, session.traffic.bytes_up, session.traffic.bytes_down) == (
        found.requests,
        found.bytes_up,
        found.bytes_down,
    )
    assert found.bytes_per_token == (found.bytes_up + found.bytes_down) / 2.5


@pytest.mark.filterwarnings("ignore:.*generation_config:UserWarning")
def test_the_pass_over_a_prompt_verifies_drafted_tokens_too(tiny: Tiny, tmp_path: Path) -> None:
    model: Any = tiny("llama")
    model.save_pretrained(tmp_path / "model")
    asked: dict[str, Any] = {"layers": "all", "embeddings": True}
    draft = copy.deepcopy(model)
    draft.generation_config.num_assistant_tokens = 3
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    found = plan_generation(str(tmp_path / "model"), **asked, prompt_tokens=5, drafted=3, accepted=1.0, measure=False)
    outsourced = ciphertune.outsource(model, "mlwe", **asked)
    first, later, *_ = counted(outsourced, torch.arange(1, 6)[None], 8, assistant_model=draft)
    assert (first.bytes_up, first.bytes_down) == (found.prompt_bytes_up, found.prompt_bytes_down)
    assert (later.bytes_up, later.bytes_down) == (found.bytes_up, found.bytes_down)


def test_a_model_that_cannot_drop_tokens_sends_all_of_them_through_its_head(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.TrOCRConfig(
        vocab_size=64, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64
    )
    model = transformers.TrOCRForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    up: list[list[int]] = []
    for layers in (None, "all"):
        found = plan_generation(str(tmp_path / "model"), layers=layers, prompt_tokens=5, measure=False)
        first, later, *_ = counted(
            ciphertune.outsource(copy.deepcopy(model), "mlwe", layers), torch.arange(1, 6)[None], 3
        )
        up.append([first.bytes_up, later.bytes_up, found.prompt_bytes_up, found.bytes_up])
    # Layers for an encoder's output are planned, and nothing asks for them here: the head is the difference.
    of_prompt, of_token, planned_prompt, planned_token = (many - few for few, many in zip(*up, strict=True))
    assert of_prompt == planned_prompt == 5 * of_token
    assert of_token == planned_token


def test_round_trips_are_counted_from_the_model_as_it_is() -> None:
    whole = plan_generation("smollm2", latency=0.01, measure=False)
    assert whole.round_trips == 120
    assert whole.latency_seconds == pytest.approx(2.4)
    half = plan_generation("smollm2", latency=0.01, layers=["*.mlp.*"], measure=False)
    assert half.round_trips == 60
    apart = plan_generation("smollm2", "mlwe?share_inputs=0", measure=False)
    assert apart.round_trips == 210
    spread = plan_generation("smollm2", workers=2, placement="rows", measure=False)
    assert (spread.round_trips, spread.requests) == (120, 240)
    many = plan_generation("smollm2", latency=0.01, sequences=16, measure=False)
    assert many.latency_seconds == whole.latency_seconds
    assert many.most_tokens_per_second > 10 * whole.most_tokens_per_second
    drafted = plan_generation("smollm2", latency=0.01, drafted=10, accepted=4, measure=False)
    assert drafted.most_tokens_per_second > 3 * whole.most_tokens_per_second
    assert whole.tokens_per_second is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"drafted": 4}, "with --accepted"),
        ({"drafted": 4, "accepted": 6.0}, "yields from 1 to 5, not 6"),
        ({"accepted": 2.0}, "yields from 1 to 1, not 2"),
        ({"sequences": 0}, "must be above 0"),
    ],
)
def test_what_cannot_be_is_refused(options: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan_generation("smollm2", measure=False, **options)


@pytest.mark.filterwarnings("error")
def test_the_command_predicts_seconds(tiny: Tiny, tmp_path: Path) -> None:
    model: Any = tiny("llama")
    model.save_pretrained(tmp_path / "model")

    def planned(*options: str) -> Any:
        arguments = ["plan", str(tmp_path / "model"), "--generate", "--prompt-tokens", "5", "--json", *options]
        return json.loads(CliRunner().invoke(cli, arguments, catch_exceptions=False).stdout)

    near = planned("--latency", "0ms", "--save-speeds", str(tmp_path / "speeds.json"))
    assert near["client_compute_measured"]
    assert near["pass_seconds"] > 0
    assert near["tokens_per_second"] == pytest.approx(1 / near["pass_seconds"])
    speeds = ["--client-speeds", str(tmp_path / "speeds.json"), "--worker-speeds", str(tmp_path / "speeds.json")]
    far = planned("--latency", "1s", *speeds)
    assert far["round_trips"] == 8
    assert far["pass_seconds"] == pytest.approx(near["pass_seconds"] + 16, abs=0.1)
    assert far["first_token_seconds"] >= 16
    assert far["total_seconds"] == pytest.approx(far["first_token_seconds"] + 127 * far["pass_seconds"], rel=1e-6)
    drafted = planned("--latency", "1s", *speeds, "--drafted", "3", "--accepted", "2", "--draft-time", "1s")
    assert drafted["pass_seconds"] == pytest.approx(far["pass_seconds"] + 3, abs=0.2)
    shown = CliRunner().invoke(cli, ["plan", "smollm2", "--generate", "--no-measure"], catch_exceptions=False).stdout
    assert "120 round trips one after the other" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--generate", "--tokens", "8"], "--tokens is of a plan of training"), (["--sequences", "2"], "add --generate")],
)
def test_options_of_the_other_plan_are_refused(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(cli, ["plan", "smollm2", "--no-measure", *arguments])
    assert said in str(result.exception)


def test_a_model_that_cannot_be_cut_is_guessed(tiny: Tiny, tmp_path: Path) -> None:
    model: Any = tiny("gpt2")
    model.save_pretrained(tmp_path / "model")
    found = plan_generation(str(tmp_path / "model"), prompt_tokens=5)
    assert found.tokens_per_second is not None
