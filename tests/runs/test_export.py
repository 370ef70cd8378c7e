"""Adapters for use elsewhere: merged models and GGUF files that give the logits of model and adapter."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_gguf
import torch
from click.testing import CliRunner
from gguf import GGUFReader
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import ciphertune
from ciphertune.cli import cli
from ciphertune.errors import ConfigError
from ciphertune.models.load import load_named_model
from ciphertune.runs.export import export_adapter
from ciphertune.training import adapter as saving
from ciphertune.training.gguf_adapter import permuted

IDS = torch.arange(1, 9)[None]
TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]

# Of merging, by peft; and of names in transformers that peft uses still.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def save_model(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    tiny.llama(**changes).save_pretrained(folder)
    return folder


def save_adapter(base: Any, folder: Path, **options: Any) -> Tensor:
    """Save an adapter with random values; return the logits of model and adapter."""
    torch.manual_seed(1)
    values: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
    model: Any = get_peft_model(base, LoraConfig(**values)).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    saving.save(model, folder)
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS).logits
    return logits


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(tmp_path / "base")


@pytest.fixture
def adapter(folder: Path, tmp_path: Path) -> Path:
    save_adapter(load(folder), tmp_path / "adapter")
    return tmp_path / "adapter"


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS).logits
    return found


def test_an_adapter_names_its_model_without_a_path(folder: Path, tmp_path: Path) -> None:
    save_adapter(load(folder), tmp_path / "adapter")
    for file in (tmp_path / "adapter").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file
    stated = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert stated["base_model_name_or_path"] == "base"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_model_gives_the_logits_of_model_and_adapter(dtype: torch.dtype, tmp_path: Path) -> None:
    base = tiny.model("llama").to(dtype)
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    expected = save_adapter(load(tmp_path / "base").float(), tmp_path / "adapter")
    found = export_adapter(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "out")
    assert (found.layers, found.dtype) == (2 * len(TARGETS), str(dtype)[6:])
    merged = load(tmp_path / "out")
    assert merged.dtype == dtype
    near = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(logits(merged.float()), expected, rtol=near, atol=near * float(expected.abs().max()))
    assert not list(tmp_path.glob(".draft-*"))
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()


def from_gguf(file: Path, base: Any, heads: tuple[int, int]) -> Any:
    """Add what a GGUF adapter says to a model's weights, as llama.cpp does."""
    reader = GGUFReader(file)
    fields = {name: reader.fields[name].contents() for name in reader.fields}
    assert (fields["general.type"], fields["adapter.type"], fields["general.architecture"]) == (
        "adapter",
        "lora",
        "llama",
    )
    held = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    names |= {"ffn_down": "mlp.down_proj"}
    for name in [name for name in held if name.endswith(".lora_a")]:
        _, block, layer, _, _ = name.split(".")
        a, b = held[name], held[name.replace("lora_a", "lora_b")]
        weight = base.get_submodule(f"model.layers.{block}.{names[layer]}").weight
        count = {"attn_q": heads[0], "attn_k": heads[1]}.get(layer, 0)
        stored = permuted(weight.data, count) if count else weight.data
        stored = stored + fields["adapter.lora.alpha"] / a.shape[0] * b @ a
        if count:  # back to the order of transformers
            rows, columns = stored.shape
            stored = stored.reshape(count, rows // count // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
        weight.data = stored
    return base


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"k_proj": 9}}], ids=str
)
def test_a_gguf_adapter_gives_the_logits_of_model_and_adapter(options: Any, folder: Path, tmp_path: Path) -> None:
    expected = save_adapter(load(folder), tmp_path / "adapter", **options)
    found = export_adapter(str(folder), tmp_path / "adapter", tmp_path / "out" / "a.gguf", form="gguf")
    assert found.layers == 2 * len(TARGETS)
    assert found.bytes == (tmp_path / "out" / "a.gguf").stat().st_size
    changed = from_gguf(tmp_path / "out" / "a.gguf", load(folder), (4, 2))
    torch.testing.assert_close(logits(changed), expected, rtol=1e-3, atol=1e-3)


def test_a_gguf_adapter_fits_the_names_and_shapes_of_the_model_in_gguf_form(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    tiny_gguf.write(tmp_path / "base" / "tiny.gguf")
    base, _ = load_named_model(str(tmp_path / "base"), "tiny.gguf")
    expected = save_adapter(base, tmp_path / "adapter")
    arguments: dict[str, Any] = {"gguf_file": "tiny.gguf"}
    export_adapter(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "a.gguf", form="gguf", **arguments)
    model = {t.name: t.shape for t in GGUFReader(tmp_path / "base" / "tiny.gguf").tensors}
    adapter = {t.name: t.shape for t in GGUFReader(tmp_path / "a.gguf").tensors}
    for name, shape in adapter.items():
        weight = model[name.rpartition(".lora_")[0]]
        assert shape[0 if name.endswith("a") else 1] == weight[0 if name.endswith("a") else 1]
    export_adapter(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "merged", **arguments)
    torch.testing.assert_close(logits(load(tmp_path / "merged")), expected, rtol=1e-3, atol=1e-3)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


def test_a_classifier_is_merged_with_its_head_and_labels(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, id2label={0: "no", 1: "yes"})
    base.config.pad_token_id = 0
    tiny.save_letters(folder)
    expected = save_adapter(base, tmp_path / "adapter", task_type="SEQ_CLS", modules_to_save=["score"])
    base.config.architectures = [type(base).__name__]
    base.config.save_pretrained(tmp_path / "adapter")
    export_adapter(str(folder), tmp_path / "adapter", tmp_path / "out")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    merged.config.pad_token_id = 0
    assert merged.config.id2label == {0: "no", 1: "yes"}
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(ConfigError, match="cannot hold modules that were trained whole"):
        export_adapter(str(folder), tmp_path / "adapter", tmp_path / "a.gguf", form="gguf")


def test_a_bundles_client_is_refused_where_weights_are_needed(folder: Path, adapter: Path, tmp_path: Path) -> None:
    client = ciphertune.split(str(folder), tmp_path / "bundle").client
    with pytest.raises(ConfigError, match="is a bundle's client, whose outsourced weights are at the workers"):
        export_adapter(str(client), adapter, tmp_path / "out")
    export_adapter(str(client), adapter, tmp_path / "a.gguf", form="gguf")
    export_adapter(str(folder), adapter, tmp_path / "b.gguf", form="gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize("form", ["model", "gguf"])
@pytest.mark.parametrize("changes", [{"hidden_size": 32}, {"num_hidden_layers": 1}], ids=str)
def test_an_adapter_of_another_model_is_refused(form: Any, changes: Any, adapter: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", **changes)
    with pytest.raises(ConfigError, match="of another model"):
        export_adapter(str(other), adapter, tmp_path / "out", form=form)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_dora": True}, "DoRA's magnitudes"),
        ({"bias": "lora_only"}, "biases"),
        ({"modules_to_save": ["lm_head"]}, "modules that were trained whole"),
    ],
)
def test_what_a_gguf_file_cannot_hold_is_refused_and_merged(
    options: Any, said: str, folder: Path, tmp_path: Path
) -> None:
    expected = save_adapter(load(folder), tmp_path / "adapter", **options)
    with pytest.raises(ConfigError, match=f"cannot hold {said}"):
        export_adapter(str(folder), tmp_path / "adapter", tmp_path / "a.gguf", form="gguf")
    export_adapter(str(folder), tmp_path / "adapter", tmp_path / "out")
    torch.testing.assert_close(logits(load(tmp_path / "out")), expected, rtol=1e-3, atol=1e-3)


def test_a_tied_head_and_other_architectures_are_refused_as_gguf(tmp_path: Path) -> None:
    tied = save_model(tmp_path / "tied", tie_word_embeddings=True)
    save_adapter(load(tied), tmp_path / "adapter", target_modules=["lm_head", "q_proj"])
    with pytest.raises(ConfigError, match="'lm_head': it is tied"):
        export_adapter(str(tied), tmp_path / "adapter", tmp_path / "a.gguf", form="gguf")
    tiny.gpt2().save_pretrained(tmp_path / "gpt2")
    save_adapter(load(tmp_path / "gpt2"), tmp_path / "other", target_modules=["c_attn"], fan_in_fan_out=True)
    with pytest.raises(ConfigError, match="for the architecture 'gpt2'"):
        export_adapter(str(tmp_path / "gpt2"), tmp_path / "other", tmp_path / "a.gguf", form="gguf")


def test_another_tuner_is_merged_and_refused_as_gguf(folder: Path, tmp_path: Path) -> None:
    from peft import IA3Config, PromptTuningConfig

    model = get_peft_model(load(folder), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    for name, parameter in model.named_parameters():
        if "ia3" in name:
            parameter.data.fill_(1.5)
    saving.save(model, tmp_path / "ia3")
    export_adapter(str(folder), tmp_path / "ia3", tmp_path / "out")
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(model), rtol=1e-3, atol=1e-3)
    with pytest.raises(ConfigError, match="of the kind IA3, and a GGUF adapter holds LORA alone"):
        export_adapter(str(folder), tmp_path / "ia3", tmp_path / "a.gguf", form="gguf")
    prompts = get_peft_model(load(folder), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    saving.save(prompts, tmp_path / "prompts")
    with pytest.raises(ConfigError, match="cannot merge the adapter .*PROMPT_TUNING"):
        export_adapter(str(folder), tmp_path / "prompts", tmp_path / "other")


def invoke(*args: object) -> Any:
    return CliRunner().invoke(cli, ["export", *map(str, args)])


def test_the_command_replaces_nothing_unless_told_to(folder: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = invoke(folder, out, "--adapter", adapter, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["model"] == "base"
    again = invoke(folder, out, "--adapter", adapter)
    assert "exists already" in str(again.exception)
    (out / "mine.txt").write_text("mine")
    assert invoke(folder, out, "--adapter", adapter, "--overwrite").exit_code == 0
    assert not (out / "mine.txt").exists()
    file = tmp_path / "a.gguf"
    for _ in range(2):
        result = invoke(folder, file, "--adapter", adapter, "--form", "gguf", "--overwrite")
        assert result.exit_code == 0, result.output
    assert "exists already" in str(invoke(folder, file, "--adapter", adapter, "--form", "gguf").exception)
    assert "is a folder" in str(invoke(folder, out, "--adapter", adapter, "--form", "gguf", "--overwrite").exception)


def test_bad_input_is_said_and_loses_nothing(
    folder: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="there is no adapter in .*base: cannot read adapter_config.json"):
        export_adapter(str(folder), folder, out)
    with pytest.raises(ConfigError, match="cannot be written"):
        export_adapter(str(folder), adapter, folder / "config.json" / "out")
    for name, content in (("adapter_config.json", "{"), ("adapter_model.safetensors", "cut")):
        broken = tmp_path / f"broken-{name}"
        shutil.copytree(adapter, broken)
        (broken / name).write_text(content)
        with pytest.raises(ConfigError, match="is damaged"):
            export_adapter(str(folder), broken, out)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    export_adapter(str(folder), adapter, out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(ConfigError, match="out cannot be written: No space left on device"):
        export_adapter(str(folder), adapter, out, overwrite=True)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    monkeypatch.setattr("gguf.GGUFWriter.write_tensors_to_file", full)
    with pytest.raises(ConfigError, match="a.gguf cannot be written: No space left on device"):
        export_adapter(str(folder), adapter, tmp_path / "a.gguf", form="gguf")
    assert not (tmp_path / "a.gguf").exists()
    assert not list(tmp_path.glob(".draft-*"))
