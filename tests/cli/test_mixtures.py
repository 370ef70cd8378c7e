"""A mixture of experts through the commands: trained from a file, generated with, split, served, at a worker."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from click.testing import CliRunner

from ciphertune.cli import cli
from ciphertune.generation.opening import open_model
from ciphertune.generation.source import find_source
from ciphertune.outsourcing.experts import outsourced_experts
from ciphertune.serving.server import Server
from ciphertune.serving.settings import ServeSettings

# peft's own settings for mixtures of experts, of which these targets match some.
pytestmark = pytest.mark.filterwarnings("ignore:.*pattern keys did not match:RuntimeWarning")

TEXTS = [{"text": "the quick brown fox jumps over the lazy dog. " * 3} for _ in range(12)]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Mixtral with a tokenizer, texts, and the file of a run."""
    import transformers

    made = tmp_path_factory.mktemp("mixture")
    torch.manual_seed(3)
    config = transformers.MixtralConfig(
        vocab_size=97, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, num_local_experts=3, num_experts_per_tok=2, eos_token_id=96,
    )  # fmt: skip
    model: Any = transformers.MixtralForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(made / "model")
    tiny.save_letters(made / "model")
    (made / "texts.jsonl").write_text("\n".join(map(json.dumps, TEXTS)))
    (made / "run.toml").write_text(
        'to = "mlwe"\n[model]\nname = "model"\n[data]\nsource = "texts.jsonl"\nlength = 40\nheld_out = 0.2\n'
        '[lora]\ntarget_modules = ["q_proj", "v_proj"]\n[training]\noutput = "out"\nsteps = 8\nlearning_rate = 2e-2\n'
    )
    return made


def invoke(*args: object) -> Any:
    result = CliRunner().invoke(cli, [*map(str, args)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.parametrize("to", ["mlwe", "mlwe?experts=routed"])
def test_it_is_trained_from_a_file_and_generates(project: Path, tmp_path: Path, to: str) -> None:
    file = project / f"run{len(to)}.toml"
    file.write_text((project / "run.toml").read_text().replace('"mlwe"', f'"{to}"').replace('"out"', f'"{tmp_path}"'))
    trained = json.loads(invoke("train", file, "--json").stdout)
    assert trained["evaluations"][-1]["eval_loss"] < trained["evaluations"][0]["eval_loss"]
    assert trained["outsourced_fraction"] > 0.5
    answer = json.loads(invoke("generate", file, "the qui", "--max-new-tokens", 4, "--json").stdout)
    assert answer["new_tokens"] == 4
    with open_model(find_source(str(file), to="clear")) as opened:
        assert len(outsourced_experts(opened.model)) == 1
        server = Server("mixture", opened.model, opened.tokenizer, ServeSettings(port=0, max_new_tokens=4))
        server.start()
        try:
            body = json.dumps({"model": "mixture", "prompt": "the qui", "max_tokens": 4, "temperature": 0}).encode()
            request = urllib.request.Request(
                f"{server.address}/v1/completions", body, {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=60) as reply:
                assert json.load(reply)["usage"]["completion_tokens"] == 4
        finally:
            server.close()


def test_its_bundle_is_at_a_worker(project: Path, tmp_path: Path, ciphertune_worker: Callable[..., Any]) -> None:
    shown = json.loads(invoke("split", project / "model", tmp_path / "bundle", "--json").stdout)
    assert shown["layers"] == 4 + 2 * 3
    served = ciphertune_worker(tmp_path / "bundle" / "worker")
    client, asked = tmp_path / "bundle" / "client", ("the qui", "--max-new-tokens", 4, "--json")
    far = json.loads(invoke("generate", client, "--to", served.selection("mlwe"), *asked).stdout)
    near = json.loads(invoke("generate", project / "model", "--to", "clear", *asked).stdout)
    assert far["new_tokens"] == 4
    assert far["text"][0] == near["text"][0]
