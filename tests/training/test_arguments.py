"""Training arguments of transformers as settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainingArguments

import ciphertune
from ciphertune.errors import TrainingError
from ciphertune.plugins.manager import PluginManager
from ciphertune.training.arguments import settings_of


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[], **changes)


def model() -> Any:
    tuned = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    return ciphertune.outsource(tuned, "clear", plugins=PluginManager())


def test_what_is_read(tmp_path: Path) -> None:
    given = arguments(
        tmp_path,
        num_train_epochs=3,
        learning_rate=1e-3,
        weight_decay=0.01,
        gradient_accumulation_steps=4,
        max_grad_norm=0.0,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        eval_strategy="steps",
        eval_steps=7,
        save_total_limit=1,
        per_device_train_batch_size=3,
    )
    expected = {
        "epochs": 3,
        "learning_rate": 1e-3,
        "weight_decay": 0.01,
        "accumulation": 4,
        "max_grad_norm": None,
        "schedule": "cosine",
        "warmup_steps": 10.0,
        "eval_every": 7,
        "keep_checkpoints": 1,
    }
    assert settings_of(given, own_optimizer=True) == expected
    assert settings_of(vars(given), own_optimizer=True) == expected
    trainer = ciphertune.LoraTrainer(model(), training_args=given, epochs=5, plugins=PluginManager())
    assert (trainer.settings.epochs, trainer.settings.accumulation) == (5, 4)
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-3


def test_an_optimizer_that_is_given_has_the_rate_and_the_schedule(tmp_path: Path) -> None:
    tuned = model()
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=0.5)
    given = vars(arguments(tmp_path, num_train_epochs=2, adam_beta1=0.5))
    trainer = ciphertune.LoraTrainer(tuned, optimizer=optimizer, training_args=given, plugins=PluginManager())
    assert trainer.settings.schedule == "constant"
    assert trainer.optimizer.param_groups[0]["lr"] == 0.5
    assert trainer.settings.epochs == 2


def test_as_few_as_concrete_ml_reads() -> None:
    given = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "use_cpu": True}
    assert settings_of(given, own_optimizer=True) == {"accumulation": 2, "max_grad_norm": 0.5}
    assert settings_of({"max_steps": 9, "num_train_epochs": 3.0}, own_optimizer=False) == {"steps": 9}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gradient_acumulation_steps": 2}, "did you mean 'gradient_accumulation_steps'"),
        ({"num_train_epochs": 2.5}, "num_train_epochs must be a whole number"),
        ({"lr_scheduler_type": "polynomial"}, "'polynomial' is not supported"),
        ({"optim": "adafactor"}, "optim='adafactor' is not supported here; give an optimizer"),
        ({"bf16": True}, "bf16=True is not supported"),
        (TrainingArguments, "not a type"),
        (3, "not a int"),
    ],
)
def test_what_is_refused(given: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        ciphertune.LoraTrainer(model(), training_args=given, plugins=PluginManager())
