"""Outsourced models in TRL's ``SFTTrainer``: the losses of the same training in the clear."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import ciphertune
from ciphertune.errors import OutsourcedWeightError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    # These libraries' own: torch's checkpointing, pinned memory without an accelerator, names that were changed.
    pytest.mark.filterwarnings("ignore"),
    # Not imported here: that takes seconds, in every process that collects tests.
    pytest.mark.skipif(not all(map(find_spec, ("trl", "datasets"))), reason="SFTTrainer needs trl, and Python 3.11"),
]

DATA = [{"prompt": f"{a} and {b}:", "completion": f" {a + b}"} for a in range(4) for b in range(4)]


def tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # they come in any order
    words = {token: number for number, token in enumerate(["<pad>", "<end>", *letters])}
    made = Tokenizer(models.BPE(vocab=words, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>")


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 2048}
    return tiny.llama(**sizes, num_key_value_heads=4)


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")


def adapted() -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(llama(), lora())


def fit(model: Any, folder: Path, peft_config: LoraConfig | None = None, **options: Any) -> tuple[Any, list[float]]:
    """The trainer, and its losses followed by its gradient norms."""
    import datasets
    import trl

    values = {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2, "logging_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True,
        "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**{**values, **options}),
        train_dataset=datasets.Dataset.from_list(DATA),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return trainer, [entry[key] for key in ("loss", "grad_norm") for entry in log]


# bfloat16 and gradient checkpointing are what SFTTrainer does if not told otherwise.
PLAIN = {"bf16": False, "gradient_checkpointing": False}


@pytest.mark.parametrize("options", [{}, PLAIN, {**PLAIN, "packing": True, "max_length": 32}], ids=str)
def test_sft_trainer_gives_the_losses_of_the_clear_model(options: dict[str, Any], tmp_path: Path) -> None:
    _, expected = fit(adapted(), tmp_path / "clear", **options)
    assert len(set(expected)) == 6
    model = ciphertune.outsource(adapted(), "mlwe")
    trainer, found = fit(model, tmp_path / "outsourced", **options)
    assert found == pytest.approx(expected, rel=0.03)

    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "adapter").eval()
    ids = torch.tensor([tokenizer()("1 and 2: 3")["input_ids"]])
    with torch.no_grad():
        expected_loss = float(model.eval()(input_ids=ids, labels=ids).loss)
        assert float(loaded(input_ids=ids, labels=ids).loss) == pytest.approx(expected_loss, rel=0.03)
    ciphertune.session_of(model).close()


def test_sft_trainer_adds_the_adapters_itself(tmp_path: Path) -> None:
    _, expected = fit(llama(), tmp_path / "clear", lora(), **PLAIN)
    model = ciphertune.outsource(llama(), "mlwe")
    trainer, found = fit(model, tmp_path / "outsourced", lora(), **PLAIN)
    assert found == pytest.approx(expected, rel=0.03)
    ciphertune.session_of(trainer.model).close()


def test_an_outsourced_output_head_is_refused_not_trained_without_effect(tmp_path: Path) -> None:
    # SFTTrainer multiplies by the head's weight itself, row by row; without rows it would find a loss of zero.
    model = ciphertune.outsource(adapted(), "clear", "all")
    with pytest.raises(OutsourcedWeightError, match=r"'lm_head'.*leave the layer out with layers="):
        fit(model, tmp_path, **PLAIN)
    ciphertune.session_of(model).close()
