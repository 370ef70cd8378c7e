"""What loss functions of both forms are called with, and what is said of those that cannot be."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional

import ciphertune
from ciphertune.errors import TrainingError
from ciphertune.plugins.manager import PluginManager
from ciphertune.training.losses import Loss

# peft 0.21 asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        return self.down(torch.tanh(self.up(x)))


class Named(Net):
    def forward(self, x: Tensor) -> Any:
        return {"hidden": x, "logits": super().forward(x)}


class TakesLabels(Net):
    """As Concrete ML wants it: labels are taken and not used."""

    def forward(self, x: Tensor, labels: Any = None) -> Any:
        return super().forward(x)


class OwnLoss(Net):
    def forward(self, x: Tensor, labels: Any = None) -> Any:
        logits = super().forward(x)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


class OwnLossUnnamed(Net):
    def forward(self, x: Tensor, wanted: Tensor) -> Any:
        return {"loss": functional.cross_entropy(super().forward(x), wanted)}


def adapted(kind: type[nn.Module] = Net) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = get_peft_model(kind(), LoraConfig(r=2, target_modules=["up", "down"]))
    return ciphertune.outsource(model, "clear", plugins=PluginManager())


def losses(model: nn.Module, data: Any, loss_fn: Any = None) -> list[float]:
    trainer = ciphertune.LoraTrainer(model, loss_fn=loss_fn, learning_rate=0.05, plugins=PluginManager())
    history = trainer.train(data)
    assert trainer.evaluate(data).keys() >= {"eval_loss"}
    return history.losses


X = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))
Y = torch.randint(3, (3, 5), generator=torch.Generator().manual_seed(2))
TUPLES = list(zip(X, Y, strict=True))
MAPPINGS = [{"x": x, "labels": y} for x, y in TUPLES]


def logits_and_labels(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    assert isinstance(logits, Tensor)
    return functional.cross_entropy(logits, labels, ignore_index=ignore_index)


def outputs_and_batch(outputs: Any, batch: Any) -> Tensor:
    labels = batch["labels"] if isinstance(batch, dict) else batch[-1]
    return functional.cross_entropy(outputs["logits"] if isinstance(outputs, dict) else outputs, labels)


def test_every_form_of_loss_gives_the_same_training() -> None:
    wanted = losses(adapted(), TUPLES, functional.cross_entropy)
    assert wanted[0] != wanted[-1]
    for loss_fn in (logits_and_labels, nn.CrossEntropyLoss(), functools.partial(logits_and_labels, ignore_index=-1)):
        assert losses(adapted(), TUPLES, loss_fn) == wanted
        # The model's forward takes no labels, so it must not be given them.
        assert losses(adapted(), MAPPINGS, loss_fn) == wanted
        assert losses(adapted(Named), MAPPINGS, loss_fn) == wanted
        assert losses(adapted(Named), TUPLES, loss_fn) == wanted
    for kind in (TakesLabels, OwnLoss):
        assert losses(adapted(kind), MAPPINGS, outputs_and_batch) == wanted
    assert losses(adapted(Named), TUPLES, outputs_and_batch) == wanted
    for own in (OwnLoss, OwnLossUnnamed):
        assert losses(adapted(own), TUPLES) == wanted, "the loss of the model, of tuples"


def test_a_language_models_logits_and_labels() -> None:
    def shifted(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def model() -> nn.Module:
        torch.manual_seed(0)
        base = tiny.llama(vocab_size=32, num_hidden_layers=1, num_attention_heads=2)
        tuned: nn.Module = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        return ciphertune.outsource(tuned, "clear", plugins=PluginManager())

    ids = torch.randint(32, (2, 3, 8), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": each, "attention_mask": torch.ones_like(each), "labels": each} for each in ids]
    own = losses(model(), data)
    assert losses(model(), data, shifted) == pytest.approx(own, rel=1e-5)
    assert losses(model(), [(each, each) for each in ids]) == pytest.approx(own, rel=1e-5)


def test_an_encoder_and_decoder_gets_its_labels_for_the_decoders_input() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    def loss_fn(logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    sizes = {"vocab_size": 48, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    model = ciphertune.outsource(
        get_peft_model(base, LoraConfig(r=2, target_modules=["q"])), "clear", plugins=PluginManager()
    )
    ids = torch.randint(5, base.config.vocab_size, (2, 6))
    (loss,) = losses(model, [{"input_ids": ids, "labels": ids}], loss_fn)
    assert loss > 0


class ThreeNeeded(nn.Module):
    def forward(self, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        return logits.mean()


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (3, "is a int"),
        ("cross_entropy", "is a str"),
        (nn.CrossEntropyLoss, r"the class CrossEntropyLoss: give an instance"),
        (lambda logits: logits.mean(), "must take two arguments"),
        (lambda: 0, "must take two arguments"),
        (ThreeNeeded(), r"ThreeNeeded\(logits.*weights.*does not: missing"),
    ],
)
def test_a_wrong_loss_is_refused_when_the_trainer_is_made(loss_fn: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        ciphertune.LoraTrainer(adapted(), loss_fn=loss_fn, plugins=PluginManager())


def test_a_function_that_expects_other_arguments_is_told_what_it_got() -> None:
    with pytest.raises(TrainingError, match=r"loss function wrong\(out, b\) failed with a \w+Error.*whole batch"):
        losses(adapted(), MAPPINGS, _renamed(lambda out, b: functional.cross_entropy(out, b["labels"])))
    with pytest.raises(TrainingError, match=r"wrong\(out, batch\) failed.*a dict with 'x', 'labels'"):
        losses(adapted(TakesLabels), MAPPINGS, _renamed(lambda out, batch: functional.cross_entropy(out, batch)))
    with pytest.raises(TrainingError, match=r"no 'labels' for the loss function.*'batch'"):
        losses(adapted(), [{"x": X[0]}], functional.cross_entropy)
    with pytest.raises(TrainingError, match=r"takes no labels \(Net\.forward\(x.*loss_fn"):
        losses(adapted(), TUPLES)


def _renamed(function: Any) -> Any:
    function.__name__ = "wrong"
    return function


def test_builtins_are_taken_as_they_are() -> None:
    assert not Loss.of(torch.dist).whole
    assert Loss.of(outputs_and_batch).whole
