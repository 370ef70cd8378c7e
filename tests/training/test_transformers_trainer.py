"""Outsourced models in ``transformers.Trainer``, in a loop of one's own, and in ``LoraTrainer``: the same losses."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import ciphertune
from ciphertune import LoraTrainer
from ciphertune.plugins.manager import PluginManager

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    # peft 0.21 asks transformers for a property by its old name.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # transformers.Trainer asks DataLoader to pin memory where there is no accelerator.
    pytest.mark.filterwarnings("ignore:.pin_memory. argument is set as true:UserWarning"),
    # peft notes, and corrects, the layout of an adapter that was made on outsourced layers and is loaded on GPT-2's.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is .Conv1D.:UserWarning"),
]

# Selection string and relative tolerance of losses and gradient norms: quantization and noise move them, exact
# products do not. Losses alone say little, since clipping and Adam hide gradients of the wrong size.
BACKENDS = [("clear", 1e-5), ("simulation", 0.03), ("mlwe", 0.03)]


def llama():
    return tiny.llama(vocab_size=96, hidden_size=64, intermediate_size=96, max_position_embeddings=32)


def gpt2():
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return tiny.gpt2(vocab_size=96, n_embd=64, n_head=4, n_positions=32, **no_dropout)


LLAMA_TARGETS = ["q_proj", "v_proj", "down_proj"]
MODELS = {
    "llama": (llama, LoraConfig(r=4, target_modules=LLAMA_TARGETS, task_type="CAUSAL_LM"), 14),
    "gpt2": (gpt2, LoraConfig(r=4, target_modules=["c_attn", "c_fc"], task_type="CAUSAL_LM", fan_in_fan_out=True), 8),
}


def adapted(kind: str, to: str | None = None, order: str = "lora first"):
    make, config, layers = MODELS[kind]
    torch.manual_seed(0)
    model = make()
    if to is not None and order == "outsourced first":
        ciphertune.outsource(model, to)
        # Outsourced layers are nn.Linear to peft, whatever they were before.
        config = LoraConfig(**{**config.to_dict(), "fan_in_fan_out": False})
    torch.manual_seed(1)
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    if to is not None:
        if order == "lora first":
            ciphertune.outsource(model, to)
        assert len(ciphertune.outsourced_layers(model)) == layers
    return model


def examples(count: int = 12):
    torch.manual_seed(2)
    rows = torch.randint(0, 96, (count, 10))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in rows]


def trained(model, directory, resume_from=None, **kwargs):
    arguments = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 5,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(directory), **{**arguments, **kwargs}),
        train_dataset=examples(),
    )
    trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    return trainer, told(trainer)


def told(trainer):
    """Losses, then gradient norms."""
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [entry[key] for key in ("loss", "grad_norm") for entry in log]


@pytest.fixture(scope="module", params=MODELS)
def reference(request, tmp_path_factory):
    """Losses and gradient norms of the model that is not outsourced."""
    _, expected = trained(adapted(request.param), tmp_path_factory.mktemp("reference"))
    assert len(set(expected)) == 12
    return request.param, expected


@pytest.mark.parametrize("order", ["lora first", "outsourced first"])
@pytest.mark.parametrize(("to", "tolerance"), BACKENDS)
def test_stock_trainer_gives_the_losses_of_the_clear_model(reference, to, tolerance, order, tmp_path):
    kind, expected = reference
    if kind == "gpt2" and order == "outsourced first" and to != "clear":
        pytest.skip("one order is enough for the slower backends")
    model = adapted(kind, to, order)
    trainer, mine = trained(model, tmp_path / "run")
    assert mine == pytest.approx(expected, rel=tolerance)

    trainer.save_model(str(tmp_path / "adapter"))
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(MODELS[kind][0](), tmp_path / "adapter").eval()
    model.eval()
    batch = {key: value[None] for key, value in examples(1)[0].items()}
    with torch.no_grad():
        assert float(loaded(**batch).loss) == pytest.approx(float(model(**batch).loss), rel=tolerance)
    ciphertune.session_of(model).close()


def own_loop(model, batches):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0)
    losses, norms = [], []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.requires_grad])))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses + norms


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("to", "tolerance"), BACKENDS)
def test_own_loop_and_lora_trainer_give_the_losses_of_the_clear_model(kind, to, tolerance):
    batches = list(DataLoader(examples(), batch_size=3))
    clear = own_loop(adapted(kind).train(), batches)
    assert len(set(clear)) == 8
    assert own_loop(adapted(kind, to).train(), batches) == pytest.approx(clear, rel=tolerance)
    trainer = LoraTrainer(adapted(kind, to), learning_rate=0.01, max_grad_norm=None, plugins=PluginManager())
    history = trainer.train(batches)
    assert history.losses + [entry["grad_norm"] for entry in history.steps] == pytest.approx(clear, rel=tolerance)
    assert [entry["tokens"] for entry in history.steps] == [30] * 4


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing.* is deprecated:FutureWarning")
def test_gradient_checkpointing_gives_the_same_losses(reference, tmp_path):
    kind, expected = reference
    _, mine = trained(
        adapted(kind, "clear"),
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    assert mine == pytest.approx(expected, rel=1e-5)


def test_stock_trainer_resumes_from_its_own_checkpoint(reference, tmp_path):
    kind, expected = reference
    trained(adapted(kind, "clear"), tmp_path, save_strategy="steps", save_steps=3)
    _, mine = trained(adapted(kind, "clear"), tmp_path, resume_from=tmp_path / "checkpoint-3")
    assert mine == pytest.approx(expected, rel=1e-5)
