"""A model is opened as a command line or a run's file says; what does not fit is refused before anything is sent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch

import ciphertune
from ciphertune.errors import ConfigError
from ciphertune.generation.opening import open_model
from ciphertune.generation.source import ModelSource, find_source
from ciphertune.outsourcing.convert import outsourced_layers
from ciphertune.training.lora import add_lora

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def adapter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("run") / "out" / "adapter"
    save_adapter(tiny.llama(vocab_size=97), made)
    return made


def save_adapter(model: torch.nn.Module, place: Path) -> None:
    adapted = add_lora(model, seed=1, rank=2, targets=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(place)


def run_file(place: Path, folder: Path, **changes: str) -> Path:
    file = place / "mine.toml"
    lines = [*(f'{key} = "{value}"' for key, value in {"to": "clear", **changes}.items())]
    file.write_text(
        "\n".join(
            [*lines, "[model]", f'name = "{folder}"', "[data]", 'source = "gone.jsonl"', "[training]", 'output = "out"']
        ),
        encoding="utf-8",
    )
    return file


def test_a_run_s_file_names_model_workers_and_adapter(folder: Path, adapter: Path) -> None:
    file = run_file(adapter.parents[1], folder)
    assert find_source(str(file)) == ModelSource(
        str(folder), to="clear", adapter=str(adapter), data=find_source(str(file)).data
    )
    assert find_source(str(file), no_adapter=True, to="mlwe").adapter is None
    ids = torch.randint(0, 97, (1, 9), generator=torch.Generator().manual_seed(1))
    with open_model(find_source(str(file))) as opened, open_model(find_source(str(file), no_adapter=True)) as plain:
        assert len(outsourced_layers(opened.model)) == 14
        assert not any(parameter.requires_grad for parameter in opened.model.parameters())
        assert (opened.positions, opened.vocabulary) == (512, 97)
        with torch.no_grad():
            assert not torch.allclose(opened.model(ids).logits, plain.model(ids).logits)
    assert opened.session.closed


def test_a_run_that_has_not_ended(folder: Path, tmp_path: Path) -> None:
    file = run_file(tmp_path, folder)
    with pytest.raises(ConfigError, match=r"no adapter: .*out/adapter does not exist.*--no-adapter"):
        find_source(str(file))
    assert find_source(str(file), adapter="mine").adapter == "mine"
    with pytest.raises(ConfigError, match="exclude each other"):
        find_source(str(file), adapter="mine", no_adapter=True)
    with pytest.raises(ConfigError, match="task 'classification'"):
        find_source(str(run_file(tmp_path, folder, task="classification")))


@pytest.mark.parametrize("changes", [{"hidden_size": 32}, {"num_key_value_heads": 4}, {"num_hidden_layers": 3}])
def test_an_adapter_of_another_model(folder: Path, tmp_path: Path, changes: dict[str, int]) -> None:
    save_adapter(tiny.llama(vocab_size=97, **changes), tmp_path / "adapter")
    with pytest.raises(ConfigError, match="is of another model"):
        open_model(ModelSource(str(folder), to="clear", adapter=str(tmp_path / "adapter")))
    ciphertune.split(str(folder), tmp_path / "bundle")
    # Refused before a worker is looked for: none answers there.
    source = ModelSource(
        str(tmp_path / "bundle" / "client"), "clear+zmq://127.0.0.1:9?allow_insecure=1", str(tmp_path / "adapter")
    )
    with pytest.raises(ConfigError, match="is of another model"):
        open_model(source)


def test_a_model_without_a_tokenizer_and_folders_that_are_not_there(folder: Path, tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="tokenizer"):
        open_model(ModelSource(str(tmp_path / "model"), to="clear"))
    with pytest.raises(ConfigError, match="no such folder"):
        open_model(ModelSource(str(tmp_path / "gone" / "model"), to="clear"))
    with pytest.raises(ConfigError, match="cannot read"):
        open_model(ModelSource(str(folder), to="clear", adapter=str(tmp_path)))
    with pytest.raises(ConfigError, match="none"):
        open_model(ModelSource(str(folder), to="clear", weights=str(tmp_path)))


def test_a_damaged_adapter(folder: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ConfigError, match="damaged"):
        open_model(ModelSource(str(folder), to="clear", adapter=str(tmp_path / "adapter")))
    stated = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**stated, "peft_type": "PREFIX_TUNING"}))
    with pytest.raises(ConfigError, match="PREFIX_TUNING"):
        open_model(ModelSource(str(folder), to="clear", adapter=str(tmp_path / "adapter")))
