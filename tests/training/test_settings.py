"""The settings of a training run: one statement of them, from Python and from a file."""

from __future__ import annotations

import dataclasses
import math
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ciphertune import LoraTrainer
from ciphertune.errors import ConfigError, TrainingError
from ciphertune.plugins.manager import PluginManager
from ciphertune.runs.config import parse_config
from ciphertune.training.settings import SettingsArguments, TrainingSettings

DATA = [(torch.ones(2, 3), torch.zeros(2, 1)) for _ in range(4)]


def trainer_of(*settings: TrainingSettings, **arguments: Any) -> LoraTrainer:
    torch.manual_seed(0)
    return LoraTrainer(
        nn.Linear(3, 1),
        *settings,
        loss_fn=nn.functional.mse_loss,
        plugins=PluginManager(),
        require_outsourced=False,
        require_adapter=False,
        **arguments,
    )


def test_keyword_arguments_are_the_settings() -> None:
    assert typing.get_type_hints(SettingsArguments) == typing.get_type_hints(TrainingSettings)


def test_settings_and_changes_to_them() -> None:
    settings = TrainingSettings(learning_rate=0.1, epochs=3)
    trainer = trainer_of(settings, epochs=2, accumulation=2)
    assert trainer.settings == TrainingSettings(learning_rate=0.1, epochs=2, accumulation=2)
    assert trainer.optimizer.param_groups[0]["lr"] == 0.1
    assert len(trainer.train(DATA).losses) == 4
    assert trainer_of().settings == TrainingSettings()
    with pytest.raises(TypeError, match="epohcs"):
        trainer_of(epohcs=2)


def test_an_untyped_number_and_a_path_are_taken() -> None:
    settings = TrainingSettings(learning_rate=1, max_grad_norm=2, checkpoint_dir=Path("c"))
    assert (settings.learning_rate, settings.max_grad_norm) == (1.0, 2.0)
    assert type(settings.learning_rate) is float


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": 0}, "learning_rate must be a finite number above 0, not 0.0"),
        ({"learning_rate": math.nan}, "learning_rate must be a finite number above 0, not nan"),
        ({"learning_rate": "fast"}, "learning_rate must be a number, not 'fast'"),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number from 0, not -0.1"),
        ({"schedule": "square"}, "schedule must be one of constant, linear, cosine, not 'square'"),
        ({"epochs": 0}, "epochs must be 1 or more, not 0"),
        ({"steps": True}, "steps must be a whole number, not True"),
        ({"accumulation": 1.5}, "accumulation must be a whole number, not 1.5"),
        ({"accumulation": 2, "interleave": 3}, "interleave must be from 1 to accumulation, which is 2, not 3"),
        ({"interleave": 0}, "interleave must be 1 or more, not 0"),
        ({"max_grad_norm": math.nan}, "max_grad_norm must be above 0, not nan"),
        ({"eval_every": 0}, "eval_every must be 1 or more, not 0"),
        ({"warmup_steps": 2.5}, "warmup_steps must be a whole number, or below 1 a share, not 2.5"),
        ({"checkpoint_dir": 3}, "checkpoint_dir must be a path, not 3"),
        ({"checkpoint_every": 5}, "checkpoint_every is set but checkpoint_dir is not"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be 1 or more, not 0"),
    ],
)
def test_a_wrong_setting_is_the_same_mistake_in_python_and_in_a_file(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError) as caught:
        trainer_of(**arguments)
    assert str(caught.value).startswith(message)
    sections = {"model": {"name": "m"}, "data": {"source": "d"}, "training": {"output": "o", **arguments}}
    with pytest.raises(ConfigError) as of_file:
        parse_config(sections)
    assert str(of_file.value) == f"training.{caught.value}"


def test_the_file_has_every_setting() -> None:
    values = {"schedule": "linear", "steps": 4, "accumulation": 2, "interleave": 2, "eval_every": 1}
    values |= {"checkpoint_dir": "c", "checkpoint_every": 1, "keep_checkpoints": 3, "max_grad_norm": 2.0}
    values |= {"learning_rate": 0.5, "weight_decay": 0.1, "epochs": 2, "warmup_steps": 2.0, "eval_on_start": False}
    values |= {"gradient_norms": True, "frozen_cache": 64}
    assert values.keys() == {field.name for field in dataclasses.fields(TrainingSettings)}
    training = parse_config(
        {"model": {"name": "m"}, "data": {"source": "d"}, "training": {"output": "o", **values}}
    ).training
    assert {name: getattr(training, name) for name in values} == values
    assert isinstance(training, TrainingSettings)


def test_schedules() -> None:
    def rates(schedule: Any) -> list[float]:
        history = trainer_of(schedule=schedule, learning_rate=0.1, steps=20).train(DATA)
        return [entry["learning_rate"] for entry in history.steps]

    assert rates("constant") == [0.1] * 20
    assert rates("linear") == pytest.approx([0.1 * (20 - step) / 20 for step in range(20)])
    cosine = rates("cosine")
    assert max(cosine) == pytest.approx(0.1, rel=0.02)
    assert cosine.index(max(cosine)) in (1, 2)
    assert cosine[3:] == sorted(cosine[3:], reverse=True)
    assert cosine[-1] < 0.002


@pytest.mark.parametrize(
    "own",
    [{"optimizer": torch.optim.SGD}, {"scheduler": lambda o, n: torch.optim.lr_scheduler.ConstantLR(o)}],
)
def test_a_schedule_is_for_the_optimizer_that_the_trainer_makes(own: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match="schedule 'linear' is for the optimizer that LoraTrainer makes"):
        trainer_of(schedule="linear", **own)
    with pytest.raises(TrainingError, match="warmup_steps 3 is for the optimizer that LoraTrainer makes"):
        trainer_of(warmup_steps=3, **own)
    trainer_of(**own)


@pytest.mark.parametrize("given", [4, 0.2])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_learning_rate_rises_first(schedule: Any, given: float) -> None:
    history = trainer_of(schedule=schedule, warmup_steps=given, learning_rate=0.1, steps=20).train(DATA)
    rates = [entry["learning_rate"] for entry in history.steps]
    assert rates[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert rates[12] == pytest.approx(0.1 if schedule == "constant" else 0.05)
    assert rates[5:] == sorted(rates[5:], reverse=True)


def test_warming_up_leaves_steps_to_train() -> None:
    with pytest.raises(TrainingError, match="warmup_steps is 9, so 9 steps, and there are 9 in all"):
        trainer_of(warmup_steps=9, steps=9).train(DATA)


def test_a_run_that_warms_up_is_resumed(tmp_path: Path) -> None:
    def losses(folder: str, resume: bool = False) -> list[float]:
        trainer = trainer_of(warmup_steps=5, schedule="linear", steps=8, checkpoint_dir=tmp_path / folder)
        return trainer.train(DATA, resume=resume).losses

    whole = losses("a")
    (tmp_path / "a" / "checkpoint-8").rename(tmp_path / "gone")
    assert losses("a", resume=True) == whole


def test_an_evaluation_before_the_first_step() -> None:
    trainer = trainer_of(steps=2, eval_on_start=True)
    before = trainer.evaluate(DATA)["eval_loss"]
    evaluations = trainer.train(DATA, DATA).evaluations
    assert [entry["step"] for entry in evaluations] == [0, 2]
    assert evaluations[0]["eval_loss"] == before > evaluations[1]["eval_loss"]
    assert "eval_accuracy" not in evaluations[0]


def test_what_a_resumed_run_must_share() -> None:
    settings = TrainingSettings(accumulation=2, epochs=3, learning_rate=0.5)
    own = settings.compared_at_resume(own_optimizer=True)
    assert own == {"accumulation": 2, "max_grad_norm": 1.0, "learning_rate": 0.5, "weight_decay": 0.0}
    assert settings.compared_at_resume(own_optimizer=False) == {"accumulation": 2, "max_grad_norm": 1.0}
    interleaved = dataclasses.replace(settings, interleave=2)
    assert interleaved.compared_at_resume(own_optimizer=True) == {**own, "interleave": 2}
