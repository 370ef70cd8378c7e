"""Plans: what they say travels is what travels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import remote
import torch
from click.testing import CliRunner
from torch import nn

import ciphertune
from ciphertune import session_of
from ciphertune.cli import cli
from ciphertune.errors import ConfigError
from ciphertune.planning.plan import bytes_per_second, make_plan, seconds

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.mark.parametrize("share", ["share_inputs=1", "share_inputs=0"])
@pytest.mark.parametrize(
    "to",
    [
        "clear?x=",
        "simulation?seed=1",
        "mlwe?request_bits=32",
        "mlwe?request_bits=24&weight_bits=16",
        "mlwe?weight_bits=16",
        "mlwe?pad_tokens=32",
    ],
)
def test_the_traffic_of_a_step_is_what_was_planned(
    tiny: Callable[[str], nn.Module], tmp_path: Path, to: str, share: str
) -> None:
    to = to.replace("x=", "weight_bits=8") + "&" + share
    model: Any = tiny("llama")
    model.save_pretrained(tmp_path / "model")
    batch = remote.batches(1)[0]
    found = make_plan(str(tmp_path / "model"), to, tokens=24, targets=("q_proj", "v_proj", "gate_proj"), measure=False)
    adapted = remote.with_adapter(ciphertune.outsource(model, to))
    adapted(**batch).loss.backward()
    traffic = session_of(adapted).traffic
    assert (found.requests, found.bytes_up, found.bytes_down) == (
        traffic.requests,
        traffic.bytes_up,
        traffic.bytes_down,
    )
    part = ciphertune.share(adapted)
    assert (found.outsourced, found.at_client) == (part.outsourced, part.at_client - part.trainable)
    assert (found.bytes_without_sharing > found.bytes_up + found.bytes_down) == (share == "share_inputs=1")


def test_smollm2() -> None:
    found = make_plan("smollm2", measure=False)
    assert found.requests == 239
    assert {kind.layers: kind.count for kind in found.kinds} == dict.fromkeys(
        ("q_proj+k_proj+v_proj", "o_proj", "gate_proj+up_proj", "down_proj"), 30
    )
    assert 106e6 < found.outsourced < 107e6
    assert found.stays == {"lm_head": "it is the model's output head"}
    assert found.at_client == 49152 * 576 + 61 * 576


@pytest.mark.parametrize(
    ("sizes", "with_head", "without"),
    [
        # Llama-3-8B and 70B: the embedding stays, so it bounds the share.
        ((4096, 14336, 32, 32, 8), 0.93, 0.86),
        ((8192, 28672, 80, 64, 8), 0.985, 0.97),
    ],
)
def test_large_models(tmp_path: Path, sizes: tuple[int, ...], with_head: float, without: float) -> None:
    hidden, wide, layers, heads, kv = sizes
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    whole = make_plan(str(tmp_path), layers="all", measure=False)
    assert with_head < whole.fraction < with_head + 0.015
    assert whole.client_bytes == 2 * (128256 * hidden + (2 * layers + 1) * hidden)
    # Of the weights that a product is computed with, all but the norms are at the workers.
    assert whole.outsourced / (whole.outsourced + (2 * layers + 1) * hidden) > 0.9999
    assert without < make_plan(str(tmp_path), measure=False).fraction < without + 0.015


def test_an_estimate_has_every_part(tmp_path: Path, tiny: Callable[[str], nn.Module]) -> None:
    model: Any = tiny("llama")
    model.save_pretrained(tmp_path / "model")
    slow = make_plan(str(tmp_path / "model"), tokens=24, bandwidth=1e4, latency=0.5).estimate
    fast = make_plan(str(tmp_path / "model"), tokens=24, bandwidth=1e12, latency=0).estimate
    assert slow is not None
    assert fast is not None
    assert all(value > 0 for value in (fast.encrypt, fast.evaluate, fast.decrypt, fast.network, fast.rest))
    assert slow.limit == "network"
    assert slow.total > slow.network > 10 > fast.network


@pytest.mark.parametrize("text", ["", "1", "1 Gbit", "x Mbit/s", "-1Gbit/s", "0B/s", "1..2MB/s"])
def test_bandwidths_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="bandwidth|not a number"):
        bytes_per_second(text)


@pytest.mark.parametrize("text", ["", "5", "5 min", "-1ms"])
def test_times_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot read the time"):
        seconds(text)


def test_the_command(tmp_path: Path, tiny: Callable[[str], nn.Module]) -> None:
    model: Any = tiny("llama")
    model.save_pretrained(tmp_path / "model")
    arguments = ["plan", str(tmp_path / "model"), "--tokens", "24", "--no-measure"]
    text = CliRunner().invoke(cli, arguments).output
    assert "q_proj+k_proj+v_proj" in text.replace("\n", "").replace(" ", "") or "q_proj" in text
    found = json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).output)
    assert found["estimate"] is None
    assert found["requests"] == 15
    assert found["outsourced"] == sum(p.numel() for name, p in model.named_parameters() if name.endswith("proj.weight"))
    assert torch.tensor(found["fraction"]).isfinite()


@pytest.mark.parametrize("name", ["./private/model", "smolm2", "run.toml", "llama-3-8", "a/b/c", "~/model"])
def test_names_that_are_no_hub_names_are_not_sent_to_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *given: asked.append(given))
    with pytest.raises(ConfigError, match="not looked for on a hub"):
        make_plan(name, "mlwe", tokens=8, measure=False)
    assert asked == []


def test_other_names_are(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def download(*given: object) -> str:
        asked.append(given)
        raise OSError("no such model")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("ciphertune.models.hub.hub_answers", lambda: True)
    for name in ("x/smollm2", "gpt2"):
        with pytest.raises(ConfigError, match="no such model"):
            make_plan(name, "mlwe", tokens=8, measure=False)
    assert len(asked) == 2
