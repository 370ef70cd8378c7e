"""What is measured on held-out data beside the loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch import nn

from ciphertune import LoraTrainer
from ciphertune.plugins.manager import PluginManager
from ciphertune.training.metrics import ClassificationMetric


@pytest.mark.parametrize("labels", [2, 3, 7])
@pytest.mark.parametrize("samples", [1, 5, 60])
def test_accuracy_and_f1_are_those_of_scikit_learn(labels: int, samples: int) -> None:
    generator = torch.Generator().manual_seed(labels * samples)
    logits = torch.randn(samples, labels, generator=generator)
    wanted = torch.randint(labels, (samples,), generator=generator)
    metric = ClassificationMetric(labels)
    for at in range(0, samples, 7):
        metric.add({"logits": logits[at : at + 7]}, {"labels": wanted[at : at + 7]})
    answers = np.asarray(logits.argmax(1))
    assert metric.result() == {
        "eval_accuracy": pytest.approx(accuracy_score(wanted, answers)),
        "eval_f1": pytest.approx(f1_score(wanted, answers, average="macro", zero_division=0.0)),
    }


def test_the_trainer_measures_anew_in_each_evaluation() -> None:
    torch.manual_seed(0)
    data = [(torch.eye(3), torch.arange(3))] * 2
    trainer = LoraTrainer(
        nn.Linear(3, 3),
        loss_fn=nn.functional.cross_entropy,
        metric=lambda: ClassificationMetric(3),
        learning_rate=0.1,
        epochs=40,
        eval_on_start=True,
        plugins=PluginManager(),
        require_outsourced=False,
        require_adapter=False,
    )
    evaluations = trainer.train(data, data).evaluations
    assert evaluations[0]["eval_accuracy"] < 1.0
    assert (evaluations[-1]["eval_accuracy"], evaluations[-1]["eval_f1"]) == (1.0, 1.0)
