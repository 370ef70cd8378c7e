"""The problems of Concrete ML's three notebooks on fine-tuning, small and with random weights, and its files."""

from __future__ import annotations

import copy
import math
import os
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainingArguments

import ciphertune
from ciphertune.errors import CheckpointError, NoAdapterError

# peft 0.21 asks transformers for a property by its old name.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]


class SimpleMLP(nn.Module):
    """The network of the first notebook, with the argument that Concrete ML asks for."""

    def __init__(self, hidden: int = 128) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2, hidden)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(hidden, 2)

    def forward(self, x: Tensor, labels: Any = None) -> Tensor:
        out: Tensor = self.fc2(self.relu(self.fc1(x)))
        return out


def causal_lm_loss(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """As the second and the third notebook define it."""
    shift_logits = logits[..., :-1, :].contiguous().view(-1, logits.size(-1))
    return nn.functional.cross_entropy(shift_logits, labels[..., 1:].contiguous().view(-1), ignore_index=ignore_index)


def mlp(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LoraConfig(r=2, lora_alpha=2, lora_dropout=0.01, target_modules=["fc1", "fc2"], bias="none")
    return get_peft_model(SimpleMLP(), config)


def circles() -> DataLoader[Any]:
    from sklearn.datasets import make_circles

    x, y = make_circles(n_samples=128, noise=0.1, factor=0.4, random_state=0)
    return DataLoader(TensorDataset(torch.FloatTensor(x), torch.LongTensor(y)), batch_size=32)


def test_a_small_network() -> None:
    losses = []
    for to in ("clear", "mlwe"):
        model = ciphertune.outsource(mlp(), to)
        optimizer = optim.Adam(filter(lambda p: p.requires_grad, model.parameters()), lr=0.05)
        trainer = ciphertune.LoraTrainer(
            model,
            optimizer=optimizer,
            loss_fn=nn.CrossEntropyLoss(),
            training_args={"gradient_accumulation_steps": 1},
            epochs=6,
            max_grad_norm=None,
        )
        torch.manual_seed(1)
        losses.append(trainer.train(circles()).losses)
        if to == "mlwe":
            x = torch.randn(5, 2)
            tuned = trainer.inference_model(x)
            model.disable_adapter_layers()
            assert not torch.allclose(model(x), tuned, atol=0.05)
            model.enable_adapter_layers()
        ciphertune.session_of(model).close()
    assert losses[1] == pytest.approx(losses[0], abs=0.05)
    assert losses[1][-1] < 0.8 * losses[1][0]


def texts(count: int, length: int = 12) -> list[dict[str, list[int]]]:
    ids = torch.randint(1, 6, (count, length), generator=torch.Generator().manual_seed(4)).tolist()
    return [{"input_ids": each, "attention_mask": [1] * length, "labels": [-100, *each[1:]]} for each in ids]


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def training_arguments(folder: Path, epochs: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        save_total_limit=1,
        use_cpu=True,
        learning_rate=0.01,
        lr_scheduler_type="linear",
        seed=0,
        warmup_steps=1,
        weight_decay=0.01,
        prediction_loss_only=True,
        report_to=[],
    )


def test_gpt2_in_a_loop_of_ones_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = tiny.gpt2(n_positions=32).requires_grad_(False)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=32, lora_dropout=0.1, bias="none", task_type="CAUSAL_LM"))
    arguments = training_arguments(tmp_path, epochs=3)
    trainer = Trainer(model=model, args=arguments, train_dataset=texts(8), data_collator=collate)
    loader = trainer.get_train_dataloader()
    trainer.create_optimizer_and_scheduler(num_training_steps=len(loader) * 3)
    optimizer, scheduler = trainer.optimizer, trainer.lr_scheduler
    assert optimizer is not None
    assert scheduler is not None
    ciphertune.outsource(model, "mlwe")
    sample = {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    epochs, traffic = [], ciphertune.session_of(model).traffic
    for _ in range(3):
        total = 0.0
        for batch in loader:
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            scheduler.step()
            total += float(loss.detach())
        epochs.append(total)
        before = traffic.requests
        with ciphertune.in_the_clear(model):
            model.generate(**sample, max_new_tokens=4, pad_token_id=0)
        assert traffic.requests == before
    assert epochs[-1] < epochs[0]
    model.save_pretrained(str(tmp_path / "checkpoint-3"), save_embedding_layers=False)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(tiny.gpt2(n_positions=32), tmp_path / "checkpoint-3").eval()
    model.eval()
    with torch.no_grad(), ciphertune.in_the_clear(model):
        torch.testing.assert_close(loaded(**sample).logits, model(**sample).logits, rtol=0.05, atol=0.05)
    ciphertune.session_of(model).close()


def test_llama_with_optimizer_and_arguments_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = tiny.llama().requires_grad_(False)
    config = LoraConfig(r=8, lora_alpha=32, lora_dropout=0.01, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    arguments = training_arguments(tmp_path / "unused", epochs=2)
    theirs = Trainer(model=model, args=arguments, train_dataset=texts(8), data_collator=collate)
    loader = theirs.get_train_dataloader()
    theirs.create_optimizer_and_scheduler(num_training_steps=len(loader) * 2)
    ciphertune.outsource(model, "simulation")
    assert theirs.lr_scheduler is not None
    trainer = ciphertune.LoraTrainer(
        model,
        optimizer=theirs.optimizer,
        scheduler=theirs.lr_scheduler,
        loss_fn=causal_lm_loss,
        training_args=vars(arguments),
        eval_metric_fn=lambda model, data: {"perplexity": math.exp(float(model(**data[0]).loss))},
        gradient_norms=True,
    )
    history = trainer.train(loader, [collate(texts(4))])
    assert [entry["epoch"] for entry in history.steps] == [1, 1, 2, 2]
    assert history.losses[-1] < history.losses[0]
    assert history.evaluations[-1]["perplexity"] > 1
    assert {len(norms) for norms in history.gradient_norms.values()} == {4}
    assert history.steps[-1]["learning_rate"] < history.steps[1]["learning_rate"] == pytest.approx(0.01)
    trainer.save_adapter(tmp_path / "adapter")
    torch.manual_seed(0)
    PeftModel.from_pretrained(tiny.llama(), tmp_path / "adapter")


def their_checkpoint(folder: Path, epoch: int, seed: int) -> dict[str, Any]:
    """As ``LoraTrainer.save_checkpoint`` of Concrete ML 1.9.0 writes it, whose layers hang in modules of its own."""
    model = mlp()
    torch.manual_seed(seed)
    optimizer = optim.Adam(filter(lambda p: p.requires_grad, model.parameters()), lr=0.01)
    scheduler = optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    for x, y in circles():
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    state = {
        name.replace("fc2.base_layer.weight", "fc2.base_layer.forward_module.private_module.weight"): tensor
        for name, tensor in model.state_dict().items()
    }
    content = {
        "model_state_dict": state,
        "optimizer_state_dict": optimizer.state_dict(),
        "lr_scheduler_state_dict": scheduler.state_dict(),
        "training_losses": [0.7, 0.6],
        "global_step": 4 * epoch,
        "epoch": epoch,
        "gradient_stats": {"inference_model.base_model.model.fc1.lora_A.default.weight": [0.1, 0.2]},
    }
    torch.save(content, folder / f"checkpoint_epoch_{epoch}.pth")
    return content


def lora(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_a_checkpoint_of_concrete_ml_goes_on_here(tmp_path: Path) -> None:
    their_checkpoint(tmp_path, 9, seed=1)
    last = their_checkpoint(tmp_path, 10, seed=2)
    for to in ("clear", None):
        model = mlp(seed=0)
        if to is not None:
            ciphertune.outsource(model, to)
        found = ciphertune.load_concrete_ml(model, tmp_path)
        assert found.path.name == "checkpoint_epoch_10.pth", "the last by number, not by text"
        assert (found.epoch, found.step, found.losses) == (10, 40, [0.7, 0.6])
        assert found.gradient_norms == {"base_model.model.fc1.lora_A.default.weight": [0.1, 0.2]}
        for name, value in lora(model).items():
            assert torch.equal(value, last["model_state_dict"][name])
        assert "exp_avg" not in repr(found)
        optimizer = optim.Adam(filter(lambda p: p.requires_grad, model.parameters()), lr=0.01)
        assert found.optimizer is not None
        optimizer.load_state_dict(found.optimizer)
        trainer = ciphertune.LoraTrainer(
            model, optimizer=optimizer, loss_fn=nn.CrossEntropyLoss(), require_outsourced=to is not None
        )
        trainer.train(circles())
        assert float(next(iter(optimizer.state.values()))["step"]) == 8, "four there, four here"
    assert ciphertune.load_concrete_ml(mlp(), tmp_path / "checkpoint_epoch_9.pth").epoch == 9


def test_what_save_and_clear_private_info_wrote(tmp_path: Path) -> None:
    state = their_checkpoint(tmp_path, 1, seed=1)["model_state_dict"]
    folder = tmp_path / "deployment"
    folder.mkdir()
    torch.save({f"inference_model.{name}": tensor for name, tensor in state.items()}, folder / "complete_model.pth")
    model = mlp(seed=3)
    found = ciphertune.load_concrete_ml(model, folder)
    assert (found.epoch, found.losses, found.optimizer) == (0, [], None)
    assert all(torch.equal(value, state[name]) for name, value in lora(model).items())


class Run:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def test_what_is_no_checkpoint_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = their_checkpoint(tmp_path, 1, seed=1)
    file = tmp_path / "checkpoint_epoch_1.pth"
    model = mlp()
    before = copy.deepcopy(lora(model))
    other = get_peft_model(SimpleMLP(), LoraConfig(r=3, target_modules=["fc1", "fc2"]))
    fewer = get_peft_model(SimpleMLP(), LoraConfig(r=2, target_modules=["fc1"]))
    for wrong, message in (
        (other, r"does not fit the model in 4 places.*lora_A.*was \(2, 2\) and is \(3, 2\)"),
        (fewer, r"in 2 places.*fc2\.lora_A\.default\.weight is not in the model"),
    ):
        with pytest.raises(CheckpointError, match=message):
            ciphertune.load_concrete_ml(wrong, file)
    with pytest.raises(NoAdapterError):
        ciphertune.load_concrete_ml(SimpleMLP().requires_grad_(False), file)

    def refused(message: str, **changes: Any) -> None:
        torch.save({**content, **changes}, file)
        with pytest.raises(CheckpointError, match=message):
            ciphertune.load_concrete_ml(model, file)
        assert all(torch.equal(value, before[name]) for name, value in lora(model).items())

    refused("code is not run here", training_losses=Run())
    assert not (tmp_path / "ran").exists()
    refused("model_state_dict is no dictionary", model_state_dict=3)
    refused("cannot be read as a checkpoint", training_losses=3)
    bad = {name: tensor * math.nan for name, tensor in content["model_state_dict"].items()}
    refused("not finite", model_state_dict=bad)
    file.write_bytes(b"something else")
    with pytest.raises(CheckpointError, match=r"checkpoint_epoch_1\.pth"):
        ciphertune.load_concrete_ml(model, file)
    with pytest.raises(CheckpointError, match=r"holds no checkpoint of Concrete ML"):
        ciphertune.load_concrete_ml(model, tmp_path / "nowhere")
    mlp().save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"from_pretrained"):
        ciphertune.load_concrete_ml(model, tmp_path / "adapter")
