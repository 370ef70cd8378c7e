"""The training loop, against loops written out by hand."""

from __future__ import annotations

import copy
import math
import random
import threading

import numpy as np
import pytest
import tiny
import torch
import torch.utils.checkpoint
from hypothesis import given, settings, strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import ciphertune
from ciphertune import LoraTrainer
from ciphertune.errors import NoAdapterError, NonFiniteLossError, NothingOutsourcedError, TrainingError
from ciphertune.hookspecs import hookimpl
from ciphertune.plugins.manager import PluginManager
from ciphertune.training import batches

# peft 0.21 asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

mse = nn.functional.mse_loss


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(8, 2)

    def forward(self, x):
        return self.down(self.dropout(torch.tanh(self.up(x))))


class Labelled(nn.Module):
    """A model that computes its own loss, as transformers' do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x, labels=None):
        y = self.net(x)
        return {"y": y} if labels is None else {"y": y, "loss": mse(y, labels)}


def adapted(seed: int = 0, dropout: float = 0.0, base: type[nn.Module] = Net):
    torch.manual_seed(seed)
    model = base(dropout) if base is Net else base()
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["up", "down"], lora_dropout=dropout))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero as peft makes it: then half of the gradients vanish and hide mistakes
            nn.init.normal_(parameter, std=0.3)
    return model


def outsourced(**kwargs):
    return ciphertune.outsource(adapted(**kwargs), "clear", plugins=PluginManager())


def tuples(count: int, size: int = 3, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 6, generator=generator), torch.randn(size, 2, generator=generator)) for _ in range(count)
    ]


def trainer_of(model, **kwargs):
    kwargs = {"loss_fn": mse, "plugins": PluginManager(), "learning_rate": 0.01, **kwargs}
    return LoraTrainer(model, **kwargs)


def trainable(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


class Recorder:
    def __init__(self) -> None:
        self.calls: list[tuple] = []

    @hookimpl
    def ciphertune_training_start(self, total_steps, start_step):
        self.calls.append(("start", total_steps, start_step))

    @hookimpl
    def ciphertune_training_step(self, step, metrics):
        self.calls.append(("step", step, dict(metrics)))

    @hookimpl
    def ciphertune_evaluation(self, step, metrics):
        self.calls.append(("evaluation", step, dict(metrics)))

    @hookimpl
    def ciphertune_training_end(self, step, reason):
        self.calls.append(("end", step, reason))


def recorded():
    recorder, manager = Recorder(), PluginManager()
    manager.register(recorder)
    return recorder, manager


def by_hand(model, data, *, accumulation, epochs, max_grad_norm, lr=0.01, make_scheduler=None, steps=10**9):
    """A loop that is plainly right: the loss of a step is one graph, the mean over its micro-batches."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    scheduler = make_scheduler(optimizer) if make_scheduler else None
    losses, norms, rates = [], [], []
    model.train()
    for _ in range(epochs):
        for first in range(0, len(data), accumulation):
            if len(losses) == steps:
                break
            group = data[first : first + accumulation]
            optimizer.zero_grad()
            loss = torch.stack([mse(model(x), y) for x, y in group]).mean()
            loss.backward()
            norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in parameters]))
            if max_grad_norm is not None and norm > max_grad_norm:
                for p in parameters:
                    p.grad *= max_grad_norm / norm
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if scheduler:
                scheduler.step()
            losses.append(float(loss.detach()))
            norms.append(float(norm))
    return losses, norms, rates


@settings(max_examples=12, deadline=None)
@given(
    count=st.integers(1, 7),
    accumulation=st.integers(1, 4),
    epochs=st.integers(1, 3),
    max_grad_norm=st.sampled_from([None, 0.05, 100.0]),
)
def test_accumulation_clipping_and_epoch_remainders_equal_a_loop_by_hand(count, accumulation, epochs, max_grad_norm):
    data = tuples(count)
    mine, reference = outsourced(), adapted()
    losses, norms, _ = by_hand(reference, data, accumulation=accumulation, epochs=epochs, max_grad_norm=max_grad_norm)
    trainer = trainer_of(mine, accumulation=accumulation, epochs=epochs, max_grad_norm=max_grad_norm)
    history = trainer.train(data)
    assert len(history.losses) == epochs * math.ceil(count / accumulation) == len(losses) == trainer.step
    assert history.losses == pytest.approx(losses, rel=1e-4)
    assert [entry["grad_norm"] for entry in history.steps] == pytest.approx(norms, rel=1e-3)
    for name, value in trainable(reference).items():
        torch.testing.assert_close(trainable(mine)[name], value, rtol=1e-3, atol=2e-5)


def test_the_last_step_of_an_epoch_averages_over_what_is_left():
    data = tuples(3)
    model = outsourced()
    with torch.no_grad():
        first_epoch = [float(mse(model(x), y)) for x, y in data]
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    history = trainer_of(model, optimizer=sgd, accumulation=2).train(data)
    assert history.losses == pytest.approx([(first_epoch[0] + first_epoch[1]) / 2, first_epoch[2]])
    assert [entry["samples"] for entry in history.steps] == [6, 3]


def test_scheduler_steps_once_per_optimizer_step():
    def warmup(optimizer, total=6):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / total)

    data = tuples(5)
    _, _, rates = by_hand(adapted(), data, accumulation=2, epochs=2, max_grad_norm=1.0, make_scheduler=warmup)
    totals = []

    def make(optimizer, total):
        totals.append(total)
        return warmup(optimizer, total)

    history = trainer_of(outsourced(), accumulation=2, epochs=2, scheduler=make).train(data)
    assert totals == [6]
    assert [entry["learning_rate"] for entry in history.steps] == pytest.approx(rates)
    assert len(set(rates)) == 6


def test_steps_goes_round_as_often_as_needed():
    trainer = trainer_of(outsourced(), steps=7, accumulation=2)
    history = trainer.train(tuples(5))
    assert [(entry["step"], entry["epoch"]) for entry in history.steps] == [
        (1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2), (7, 3),
    ]  # fmt: skip


def test_tuple_and_mapping_batches_give_the_same_training():
    from transformers import BatchEncoding

    data = tuples(3)
    by_tuple = trainer_of(outsourced()).train(data).losses
    kinds = {
        "dict, loss of the model": (Labelled, None, [{"x": x, "labels": y} for x, y in data]),
        "BatchEncoding": (Labelled, None, [BatchEncoding({"x": x, "labels": y}) for x, y in data]),
        "dict, loss_fn": (Net, lambda out, batch: mse(out, batch["extra"]) * batch["one"], None),
    }
    assert trainer_of(outsourced()).train([list(batch) for batch in data]).losses == by_tuple
    for kind, (base, loss_fn, given_data) in kinds.items():
        if given_data is None:

            class Lenient(Net):
                def forward(self, x, extra, one):
                    return super().forward(x)

            base, given_data = Lenient, [{"x": x, "extra": y, "one": 1.0} for x, y in data]
        assert trainer_of(outsourced(base=base), loss_fn=loss_fn).train(given_data).losses == by_tuple, kind


def test_two_inputs_in_a_tuple():
    class Two(Net):
        def forward(self, x, shift):
            return super().forward(x + shift)

    data = [(x, x * 0 + 1, y) for x, y in tuples(2)]
    shifted = [(x + 1, y) for x, y in tuples(2)]
    assert trainer_of(outsourced(base=Two)).train(data).losses == trainer_of(outsourced()).train(shifted).losses


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_non_finite_loss_stops_before_weights_are_touched(bad, where):
    recorder, manager = recorded()
    model = outsourced()
    data = tuples(4)
    data[2 + where][1][0, 0] = bad
    kept = {}

    class Keep:
        @hookimpl
        def ciphertune_training_step(self, step):
            kept[step] = trainable(model)

    manager.register(Keep())
    trainer = trainer_of(model, accumulation=2, plugins=manager)
    with pytest.raises(NonFiniteLossError, match=rf"step 2 \(epoch 1\).*micro-batch {where + 1} of 2"):
        trainer.train(data)
    assert_same(trainable(model), kept[1])
    assert all(p.grad is None for p in model.parameters())
    assert trainer.step == 1
    assert recorder.calls[-1] == ("end", 1, "failed")


def test_non_finite_gradient_of_a_finite_loss_is_never_applied():
    def loss_fn(outputs, targets):
        zero = (outputs - outputs.detach()).sum()
        return mse(outputs, targets) + torch.sqrt(zero)  # finite, with an infinite derivative

    model = outsourced()
    before = trainable(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for limit in (None, 1.0):
        with pytest.raises(NonFiniteLossError, match="norm of its gradient"):
            # The infinite derivative only appears in the gradients, which the outsourced layers refuse to send.
            trainer_of(Direct(model), optimizer=optimizer, loss_fn=loss_fn, max_grad_norm=limit).train(tuples(2))
        assert_same(trainable(model), before)
        assert not optimizer.state


class Direct(nn.Module):
    """Only the last layer's adapter, so that gradients do not travel through an outsourced layer."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        hidden = torch.tanh(self.model.base_model.model.up.base_layer(x))
        total = self.model.base_model.model.down(hidden.detach())
        up = self.model.base_model.model.up
        return total + (up.lora_B["default"].weight.sum() + up.lora_A["default"].weight.sum())


def test_cut_graphs_are_errors():
    model = outsourced()
    before = trainable(model)
    with pytest.raises(TrainingError, match="does not depend on any trainable parameter"):
        trainer_of(model, loss_fn=lambda out, y: mse(out.detach(), y)).train(tuples(2))

    class Cut(Net):
        def forward(self, x):
            return self.down(torch.tanh(self.up(x)).detach())

    with pytest.raises(TrainingError, match=r"up\.lora_A"):
        trainer_of(outsourced(base=Cut)).train(tuples(2))
    history = trainer_of(outsourced(base=Cut), allow_unused=True).train(tuples(2))
    assert len(history.losses) == 2
    trainer = trainer_of(model)
    with trainer.adapters_off(), pytest.raises(NoAdapterError):
        trainer.train(tuples(2))
    assert_same(trainable(model), before)


def test_models_that_cannot_be_trained_are_refused():
    plain = Net()
    with pytest.raises(NothingOutsourcedError, match="require_outsourced=False"):
        trainer_of(plain)
    plain.requires_grad_(False)
    with pytest.raises(NoAdapterError, match="get_peft_model"):
        trainer_of(plain)


def test_a_model_without_adapter_in_which_nothing_is_frozen_is_refused():
    model = ciphertune.outsource(Net(), "clear", ["up"], plugins=PluginManager())
    with pytest.raises(NoAdapterError, match=r"no adapter and nothing in it is frozen, so that up\.bias, down\.weight"):
        trainer_of(model)
    trainer_of(model, require_adapter=False).train(tuples(1))
    model.up.bias.requires_grad_(False)
    trainer_of(model).train(tuples(1))
    before = Net()
    before.up.weight.requires_grad_(False)  # what stayed was left to train
    trainer_of(ciphertune.outsource(before, "clear", ["up"], plugins=PluginManager())).train(tuples(1))

    class Own(Net):
        def __init__(self):
            super().__init__()
            self.lora_A, self.lora_B = nn.Linear(6, 2), nn.Linear(2, 2)

    trainer_of(ciphertune.outsource(Own(), "clear", ["up"], plugins=PluginManager()))


def test_figures_of_ones_own_in_evaluations():
    seen = []

    def largest(model, data):
        seen.append((model.training, torch.is_grad_enabled(), len(data)))
        model.train()
        torch.rand(1)
        return {"eval_largest": torch.stack([model(x).max() for x, _ in data]).max(), "count": len(data)}

    recorder, manager = recorded()
    held = tuples(2, seed=5)
    losses = trainer_of(outsourced(dropout=0.5), eval_metric_fn=largest, plugins=manager, eval_every=2).train(
        tuples(4), held
    )
    assert seen == [(False, False, 2)] * 2
    for entry in (*losses.evaluations, recorder.calls[-2][2]):
        assert entry["count"] == 2.0
        assert isinstance(entry["eval_largest"], float)
    model = outsourced()
    assert trainer_of(model, eval_metric_fn=largest).evaluate(held)["eval_largest"] == pytest.approx(
        max(float(model(x).max().detach()) for x, _ in held)
    )
    for wrong, message in (
        (lambda model, data: 3, "dictionary of numbers by name, not a int"),
        (lambda model, data: {"x": "text"}, "a value of its dictionary is none"),
        (lambda model, data: {"eval_loss": 0}, "returns eval_loss, which is measured already"),
    ):
        with pytest.raises(TrainingError, match=message):
            trainer_of(outsourced(), eval_metric_fn=wrong).evaluate(held)
    with pytest.raises(TrainingError, match="is a int, and no function"):
        trainer_of(outsourced(), eval_metric_fn=3)


def test_the_inference_model_has_its_adapters_on_whatever_the_model_has():
    model = outsourced()
    trainer = trainer_of(model)
    x = tuples(1)[0][0]
    tuned = trainer.inference_model(x)
    flags = [p.requires_grad for p in model.parameters()]
    model.disable_adapter_layers()
    off = [p.requires_grad for p in model.parameters()]
    plain = model(x)
    assert not torch.allclose(plain, tuned)
    assert torch.equal(trainer.inference_model(x), tuned)
    assert torch.equal(model(x), plain), "off again"
    assert [p.requires_grad for p in model.parameters()] == off
    model.enable_adapter_layers()
    assert [p.requires_grad for p in model.parameters()] == flags
    trainer.train(tuples(1))


def test_a_comparison_run_in_the_clear_gives_the_same_losses():
    data = tuples(4)
    clear = trainer_of(adapted(), require_outsourced=False, epochs=3).train(data).losses
    assert trainer_of(outsourced(), epochs=3).train(data).losses == pytest.approx(clear, rel=1e-5)
    assert len(set(clear)) == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "epochs"),
        ({"epochs": None}, "epochs"),
        ({"accumulation": 0}, "accumulation"),
        ({"accumulation": 1.5}, "accumulation"),
        ({"steps": -1}, "steps"),
        ({"steps": True}, "steps"),
        ({"eval_every": 0}, "eval_every"),
        ({"keep_checkpoints": 0}, "keep_checkpoints"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"max_grad_norm": math.nan}, "max_grad_norm"),
        ({"checkpoint_every": 1}, "checkpoint_dir"),
        ({"optimizer": lambda parameters: parameters}, "optimizer"),
        ({"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))])}, "lacks"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(TrainingError, match=message):
        trainer_of(outsourced(), **arguments)


def test_optimizers_and_schedulers_that_do_not_fit_the_model():
    model = outsourced()
    parameters = [p for p in model.parameters() if p.requires_grad]
    stranger = nn.Parameter(torch.zeros(1))
    with pytest.raises(TrainingError, match="not parameters of the model"):
        trainer_of(model, optimizer=torch.optim.SGD([*parameters, stranger]))
    trainer_of(model, optimizer=torch.optim.SGD(model.parameters()))  # frozen ones do no harm
    other = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD(parameters))
    with pytest.raises(TrainingError, match="another optimizer"):
        trainer_of(model, scheduler=other)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    with pytest.raises(TrainingError, match="ReduceLROnPlateau"):
        trainer_of(model, scheduler=lambda optimizer, total: plateau(optimizer)).train(tuples(1))


def test_callable_optimizer_gets_the_trainable_parameters():
    model = outsourced()
    trainer = trainer_of(model, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5))
    held = trainer.optimizer.param_groups[0]["params"]
    assert [id(p) for p in held] == [id(p) for p in model.parameters() if p.requires_grad]


class Stream(IterableDataset):
    def __init__(self, items) -> None:
        self.items = items

    def __iter__(self):
        return iter(self.items)


class Lying(list):
    def __init__(self, items, length) -> None:
        super().__init__(items)
        self.length = length

    def __len__(self):
        return self.length


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((batch for batch in tuples(2)), "read only once"),
        (iter(tuples(2)), "read only once"),
        (TensorDataset(torch.zeros(2, 6), torch.zeros(2, 2)), "DataLoader"),
        (torch.zeros(3, 6), "iterable of batches"),
        ({"x": torch.zeros(3, 6)}, "iterable of batches"),
        (3, "iterable of batches"),
        ([], "no batch"),
        (Stream(tuples(2)), "steps"),
        (Lying(tuples(3), 4), "4 batches but gave 3"),
        (Lying(tuples(3), 2), "2 batches but gave more"),
        ([torch.zeros(3, 6)], "not a Tensor"),
        ([(torch.zeros(3, 6),)], "1 elements"),
    ],
)
def test_data_that_cannot_be_trained_on(data, message):
    with pytest.raises(TrainingError, match=message):
        trainer_of(outsourced()).train(data)


def test_data_without_a_length():
    stream = DataLoader(Stream(tuples(3)), batch_size=None)
    history = trainer_of(outsourced(), steps=5).train(stream)
    assert history.losses == trainer_of(outsourced(), steps=5).train(tuples(3)).losses
    assert [entry["epoch"] for entry in history.steps] == [1, 1, 1, 2, 2]
    with pytest.raises(TrainingError, match="no batch in epoch 1"):
        trainer_of(outsourced(), steps=5).train(Stream([]))


def test_losses_of_the_wrong_form():
    with pytest.raises(TrainingError, match="loss_fn"):
        trainer_of(outsourced(), loss_fn=None).train(tuples(1))
    with pytest.raises(TrainingError, match="no 'labels'"):
        trainer_of(outsourced(base=Labelled), loss_fn=None).train([{"x": tuples(1)[0][0]}])
    with pytest.raises(TrainingError, match=r"shape \(3, 2\)"):
        trainer_of(outsourced(), loss_fn=lambda out, y: out - y).train(tuples(1))


def test_hooks_tell_the_whole_story():
    recorder, manager = recorded()
    trainer = trainer_of(outsourced(), epochs=2, accumulation=2, plugins=manager)
    history = trainer.train(tuples(3), tuples(2, seed=5))
    assert [call[:2] for call in recorder.calls] == [
        ("start", 4), ("step", 1), ("step", 2), ("evaluation", 2),
        ("step", 3), ("step", 4), ("evaluation", 4), ("end", 4),
    ]  # fmt: skip
    assert recorder.calls[0] == ("start", 4, 0)
    assert recorder.calls[-1] == ("end", 4, "finished")
    assert [call[2] for call in recorder.calls if call[0] == "step"] == history.steps
    assert history.steps[0].keys() == {"step", "epoch", "loss", "learning_rate", "grad_norm", "seconds", "samples"}
    assert [entry["step"] for entry in history.evaluations] == [2, 4]
    assert history.evaluations[1]["eval_loss"] == recorder.calls[-2][2]["eval_loss"]


def test_an_interruption_is_told_and_passed_on():
    recorder, manager = recorded()

    class Stop:
        @hookimpl
        def ciphertune_training_step(self, step):
            if step == 2:
                raise KeyboardInterrupt

    manager.register(Stop())
    trainer = trainer_of(outsourced(), plugins=manager)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(tuples(4))
    assert recorder.calls[-1] == ("end", 2, "interrupted")


def test_evaluation_weights_every_sample_the_same_and_changes_nothing():
    model = outsourced(dropout=0.5)
    trainer = trainer_of(model)
    model.train()
    model.base_model.model.dropout.eval()  # a mode that eval() and train() would lose
    modes = [module.training for module in model.modules()]
    data = [(*tuples(1, size=1)[0],), *tuples(2, size=4, seed=3)]
    state = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    loader = DataLoader(
        TensorDataset(*(torch.cat(part) for part in zip(*data, strict=True))), batch_size=2, shuffle=True
    )
    result = trainer.evaluate(data)
    assert trainer.evaluate(loader)["eval_loss"] == pytest.approx(result["eval_loss"], rel=1e-5)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.random.get_state()[1].tolist() == state[1]
    assert random.getstate() == state[2]
    assert [module.training for module in model.modules()] == modes
    model.eval()
    with torch.no_grad():
        x, y = (torch.cat(part) for part in zip(*data, strict=True))
        assert result == {"eval_loss": pytest.approx(float(mse(model(x), y)), rel=1e-5)}


def test_training_is_the_same_with_and_without_evaluation():
    data, held_out = tuples(4), DataLoader(TensorDataset(torch.randn(4, 6), torch.randn(4, 2)), shuffle=True)
    losses = []
    for eval_data in (None, held_out):
        model = outsourced(dropout=0.5)
        torch.manual_seed(7)
        losses.append(trainer_of(model).train(data, eval_data).losses)
    assert losses[0] == losses[1]


def test_evaluation_errors():
    trainer = trainer_of(outsourced())
    with pytest.raises(TrainingError, match="no batch"):
        trainer.evaluate([])
    bad = tuples(2)
    bad[1][1][0, 0] = math.nan
    with pytest.raises(NonFiniteLossError, match="batch 2"):
        trainer.evaluate(bad)
    with pytest.raises(TrainingError, match="eval_data"):
        trainer_of(outsourced(), eval_every=1).train(tuples(1))


def test_target_counts():
    labels = torch.tensor([[1, 2, -100, 3], [-100, -100, 4, 5]])
    assert batches.count_targets(labels, shifted=False) == 5
    assert batches.count_targets(labels, shifted=True) == 4
    assert batches.count_targets(torch.zeros(3, 2), shifted=False) is None
    assert batches.size({"input_ids": labels, "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])}) == (
        "tokens",
        4,
    )
    assert batches.size({"input_ids": labels}) == ("tokens", 8)
    assert batches.size((labels, labels)) == ("samples", 2)


def test_inference_model_leaves_no_trace():
    model = outsourced(dropout=0.5)
    trainer = trainer_of(model)
    model.train()
    x = tuples(1)[0][0]
    inference = trainer.inference_model
    first = inference(x)
    assert not inference.training
    assert torch.equal(first, inference.train()(x))
    assert not first.requires_grad
    assert all(module.training for module in model.modules())
    assert inference.peft_config is model.peft_config
    model.eval()
    assert torch.equal(first, model(x))


def test_adapters_off_and_on():
    model = outsourced()
    frozen = next(p for n, p in model.named_parameters() if "up.lora_A" in n).requires_grad_(False)
    names = trainable(model).keys()
    trainer = trainer_of(model)
    x = tuples(1)[0][0]
    base = copy.deepcopy(adapted()).unload()
    with_adapter = trainer.inference_model(x)
    with trainer.adapters_off():
        torch.testing.assert_close(model(x), base(x))
        assert torch.equal(trainer.inference_model(x), with_adapter), "the inference model has its adapters on"
        torch.testing.assert_close(model(x), base(x))
    assert torch.equal(trainer.inference_model(x), with_adapter)
    assert not torch.allclose(with_adapter, base(x))
    assert trainable(model).keys() == names
    assert not frozen.requires_grad
    with (
        pytest.raises(NoAdapterError, match="peft"),
        trainer_of(Net(), require_outsourced=False, require_adapter=False).adapters_off(),
    ):
        pass


def test_save_adapter_loads_on_the_original_model(tmp_path):
    from peft import PeftModel

    model = outsourced()
    trainer = trainer_of(model)
    trainer.train(tuples(3))
    x = tuples(1)[0][0]
    for path in (tmp_path / "new" / "adapter", tmp_path / "there"):
        if path.name == "there":
            path.mkdir()
            (path / "notes.txt").write_text("kept")
            trainer.save_adapter(path)
        trainer.save_adapter(path)
        torch.manual_seed(0)
        loaded = PeftModel.from_pretrained(Net(), path)
        torch.testing.assert_close(loaded(x).detach(), trainer.inference_model(x))
    assert (tmp_path / "there" / "notes.txt").read_text() == "kept"
    assert not list(tmp_path.rglob(".*"))
    with pytest.raises(NoAdapterError):
        trainer_of(Net(), require_outsourced=False, require_adapter=False).save_adapter(tmp_path / "x")


def test_a_failed_save_leaves_the_old_adapter(tmp_path, monkeypatch):
    model = outsourced()
    trainer = trainer_of(model)
    trainer.save_adapter(tmp_path / "a")
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}

    def fail(path, **_):
        (path / "adapter_model.safetensors").write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(model, "save_pretrained", fail)
    for path in (tmp_path / "a", tmp_path / "b"):
        with pytest.raises(OSError, match="no space"):
            trainer.save_adapter(path)
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_language_model_loss_is_weighted_by_shifted_targets():
    torch.manual_seed(0)
    base = tiny.llama(vocab_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    trainer = LoraTrainer(ciphertune.outsource(model, "clear"), plugins=PluginManager())
    ids = torch.randint(0, 32, (2, 6))
    labels = ids.clone()
    labels[0, 2:] = -100
    data = [{"input_ids": ids[i : i + 1], "labels": labels[i : i + 1]} for i in range(2)]
    whole = float(trainer.inference_model(input_ids=ids, labels=labels).loss)
    result = trainer.evaluate(data)
    assert result["eval_loss"] == pytest.approx(whole, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(whole), rel=1e-4)
    assert batches.language_model(model) == "shifted"
    assert "tokens" in trainer.train(data).steps[0]
    data[0]["labels"] = torch.full_like(data[0]["labels"], -100)
    assert math.isfinite(trainer.evaluate(data)["eval_loss"])
    with pytest.raises(NonFiniteLossError, match="every label of it is -100"):
        trainer.train(data)


class Uneven(Net):
    """Micro-batches go through another number of products each, and some leave a parameter out."""

    def forward(self, x):
        for _ in range(int(x[0, 0] * 10) % 3):
            x = x + self.up(x)[..., :6]
        return super().forward(x)


@pytest.mark.parametrize("base", [Net, Uneven])
@pytest.mark.parametrize("interleave", [2, 3, 4])
def test_interleaving_changes_no_bit(base, interleave):
    """Seven micro-batches in two steps an epoch: the last step takes what is left."""
    data = tuples(7)
    histories, adapters, gradients = [], [], []

    def keep(optimizer, args, kwargs):
        gradients[-1].append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])

    for width in (1, interleave):
        model = ciphertune.outsource(adapted(base=base) if base is Net else adapted_uneven(), "clear")
        trainer = trainer_of(model, accumulation=4, interleave=width, epochs=2)
        gradients.append([])
        trainer.optimizer.register_step_pre_hook(keep)
        histories.append(trainer.train(data).losses)
        adapters.append(trainable(model))
    assert histories[0] == histories[1]
    assert len(gradients[0]) == 4
    assert all(torch.equal(a, b) for one, two in zip(*gradients, strict=True) for a, b in zip(one, two, strict=True))
    assert_same(*adapters)


def adapted_uneven():
    torch.manual_seed(0)
    model = get_peft_model(Uneven(), LoraConfig(r=2, target_modules=["up", "down"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("reentrant", [True, False])
def test_interleaving_changes_no_bit_under_gradient_checkpointing(reentrant):
    class Checkpointed(Net):
        def forward(self, x):
            for _ in range(3):  # the same parameter in several segments of one backward pass
                x = torch.utils.checkpoint.checkpoint(self.segment, x.requires_grad_(), use_reentrant=reentrant)
            return super().forward(x)

        def segment(self, x):
            return x + torch.sin(self.up(x)[..., :6])

    results = []
    for width in (1, 3):
        torch.manual_seed(0)
        model = get_peft_model(Checkpointed(), LoraConfig(r=2, target_modules=["up", "down"]))
        ciphertune.outsource(model, "clear")
        trainer_of(model, accumulation=3, interleave=width).train(tuples(6))
        results.append(trainable(model))
    assert_same(*results)


def test_interleaved_dropout_repeats_from_the_seed():
    results = []
    for seed in (1, 1, 2):
        model = outsourced(dropout=0.5)
        torch.manual_seed(seed)
        history = trainer_of(model, accumulation=4, interleave=2, epochs=2).train(tuples(8))
        results.append((history.losses, trainable(model)))
    assert results[0][0] == results[1][0] != results[2][0]
    assert_same(results[0][1], results[1][1])


@pytest.mark.parametrize("fails", ["loss", "batch", "veto"])
def test_an_interleaved_step_that_fails_touches_no_weight(fails):
    class Gate:
        left = 5

        @hookimpl
        def ciphertune_before_request(self):
            self.left -= 1
            if self.left < 0 and fails == "veto":
                raise ciphertune.errors.VetoError("no more")

    plugins = PluginManager()
    plugins.register(Gate())
    data = tuples(4)
    if fails == "loss":
        data[2] = (data[2][0], torch.full((3, 2), math.nan))
    elif fails == "batch":
        data[3] = (torch.full((3, 6), math.nan), data[3][1])
    model = ciphertune.outsource(adapted(), "clear", plugins=plugins)
    before = trainable(model)
    trainer = trainer_of(model, accumulation=4, interleave=3)
    kinds = {"loss": NonFiniteLossError, "batch": NonFiniteLossError, "veto": ciphertune.errors.VetoError}
    where = {"loss": "micro-batch 3 of 4", "batch": "micro-batch 4 of 4", "veto": None}
    with pytest.raises(kinds[fails], match=where[fails]):
        trainer.train(data)
    assert_same(trainable(model), before)
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())
    assert not [t for t in threading.enumerate() if t.name.startswith("ciphertune-task")]


def test_interleaving_is_refused_where_it_cannot_be():
    for wrong in (0, 3, 1.0):
        with pytest.raises(TrainingError, match="interleave must be"):
            trainer_of(outsourced(), accumulation=2, interleave=wrong)
    model = outsourced()
    name, parameter = next((n, p) for n, p in model.named_parameters() if p.requires_grad)
    parameter.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(TrainingError, match=f"{name} has a post-accumulate gradient hook"):
        trainer_of(model, accumulation=2, interleave=2).train(tuples(2))
    trainer_of(model, accumulation=2).train(tuples(2))
