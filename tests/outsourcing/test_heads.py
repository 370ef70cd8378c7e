"""Heads that a task trains stay at the client, whatever the order; what peft would train half is refused by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import ciphertune
from ciphertune.bundle.worker import load_worker
from ciphertune.errors import OutsourcedWeightError
from ciphertune.outsourcing.heads import outside_base_models
from ciphertune.worker.worker import Worker

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

# The class, peft's task type, modules_to_save, and the head's layers.
TASKS: list[tuple[str, str | None, list[str] | None, list[str]]] = [
    ("LlamaForSequenceClassification", "SEQ_CLS", None, ["score"]),
    ("BertForSequenceClassification", "SEQ_CLS", None, ["classifier"]),
    ("LlamaForTokenClassification", "TOKEN_CLS", None, ["score"]),
    ("BertForTokenClassification", "TOKEN_CLS", None, ["classifier"]),
    ("LlamaForQuestionAnswering", "QUESTION_ANS", None, ["qa_outputs"]),
    ("BertForQuestionAnswering", "QUESTION_ANS", None, ["qa_outputs"]),
    # Heads of two layers, under a name that no task type of peft knows.
    ("RobertaForSequenceClassification", "SEQ_CLS", None, ["classifier.dense", "classifier.out_proj"]),
    ("BartForSequenceClassification", None, ["classification_head"],
     ["classification_head.dense", "classification_head.out_proj"]),
]  # fmt: skip
TARGETS = {"Llama": ["q_proj", "v_proj"], "Bert": ["query", "value"], "Roberta": ["query"], "Bart": ["q_proj"]}


def made(name: str) -> Any:
    changes = {"num_labels": 2} if "QuestionAnswering" in name else {"num_labels": 3}
    if name.startswith("Roberta"):
        changes["max_position_embeddings"] = 32
    if name.startswith("Bart"):
        import transformers

        torch.manual_seed(0)
        sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
        config = transformers.BartConfig(
            vocab_size=96, d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, encoder_attention_heads=4,
            decoder_attention_heads=4, max_position_embeddings=32, num_labels=3, eos_token_id=2, **sizes,
        )  # fmt: skip
        return transformers.BartForSequenceClassification(config).eval()
    return small.model(name, **changes)


def inputs(name: str) -> dict[str, torch.Tensor]:
    ids = small.ids(4) if not name.startswith("Bart") else small.ids(4).clamp(min=3)
    if name.startswith("Bart"):
        ids[:, -1] = 2
    if "Question" in name:
        return {
            "input_ids": ids,
            "start_positions": torch.tensor([0, 1, 2, 3]),
            "end_positions": torch.tensor([1, 2, 3, 4]),
        }
    labels = torch.arange(ids.numel()).view_as(ids) % 3 if "Token" in name else torch.tensor([0, 1, 2, 0])
    return {"input_ids": ids, "labels": labels}


def adapted(model: nn.Module, name: str, task: str | None, whole: list[str] | None) -> Any:
    torch.manual_seed(1)
    targets = next(value for key, value in TARGETS.items() if name.startswith(key))
    return get_peft_model(model, LoraConfig(r=2, task_type=task, target_modules=targets, modules_to_save=whole)).eval()


def steps(model: Any, batch: dict[str, torch.Tensor]) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("name", "task", "whole", "head", "order"),
    [
        pytest.param(*task, order, id=f"{task[0]}, {order}")
        for task in TASKS
        for order in ("outsourced first", "adapted first", "bundle")
    ],
)
def test_heads_train_and_save_as_in_the_clear(
    name: str, task: str | None, whole: list[str] | None, head: list[str], order: str, tmp_path: Path
) -> None:
    reference, batch = adapted(made(name), name, task, whole), inputs(name)
    if order == "adapted first":
        model = ciphertune.outsource(adapted(made(name), name, task, whole), "clear")
    elif order == "outsourced first":
        model = adapted(ciphertune.outsource(made(name), "clear"), name, task, whole)
    else:
        made(name).save_pretrained(tmp_path / "model")
        bundle = ciphertune.split(str(tmp_path / "model"), tmp_path / "bundle", weight_bits=16)
        worker = Worker(load_worker(bundle.workers[0]))
        loaded = ciphertune.load_client(bundle.client, "clear?weight_bits=16", worker=worker)
        model = adapted(loaded, name, task, whole)
    outsourced = {layer.name for layer in ciphertune.outsourced_layers(model)}
    assert len(outsourced) >= 12
    assert not outsourced & set(head)
    trainable = [{n for n, p in each.named_parameters() if p.requires_grad} for each in (model, reference)]
    assert trainable[0] == trainable[1]
    assert all(
        any(
            f"{layer}.modules_to_save" in n
            or ("modules_to_save" in n and n.endswith(f"{layer.rpartition('.')[2]}.weight"))
            for n in trainable[0]
        )
        for layer in head
    )
    losses, expected = steps(model, batch), steps(reference, batch)
    assert losses == pytest.approx(expected, rel=1e-3)
    assert losses[-1] < losses[0]
    with torch.no_grad():
        wanted = model(**batch).loss
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        again = PeftModel.from_pretrained(made(name), tmp_path / "adapter").eval()(**batch).loss
    torch.testing.assert_close(again, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("whole", [["q_proj"], ["mlp"], ["model.layers.1.self_attn.o_proj"]])
@pytest.mark.parametrize("restored", [False, True])
def test_what_peft_would_train_without_its_weight_is_refused(whole: list[str], restored: bool) -> None:
    model = ciphertune.outsource(small.model("LlamaForCausalLM"), "clear")
    settings = LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=whole)
    if restored:
        assert get_peft_model(ciphertune.restore(model), settings) is not None
        return
    with pytest.raises(OutsourcedWeightError, match=r"peft is to train 'model\.layers\.\d.*modules_to_save"):
        get_peft_model(model, settings)


def test_a_head_that_was_named_is_outsourced_and_then_not_trained() -> None:
    model = ciphertune.outsource(made("BertForSequenceClassification"), "clear", layers="all")
    assert "classifier" in {layer.name for layer in ciphertune.outsourced_layers(model)}
    with pytest.raises(OutsourcedWeightError, match="peft is to train 'classifier' whole"):
        adapted(model, "BertForSequenceClassification", "SEQ_CLS", None)


def test_an_adapter_with_a_head_does_not_load_on_an_outsourced_one(tmp_path: Path) -> None:
    name = "BertForSequenceClassification"
    adapted(made(name), name, "SEQ_CLS", None).save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(ciphertune.outsource(made(name), "clear"), tmp_path) is not None
    with pytest.raises(OutsourcedWeightError, match="'classifier'"):
        PeftModel.from_pretrained(ciphertune.outsource(made(name), "clear", layers="all"), tmp_path)


class Around(nn.Module):
    """A reward model of one's own: a head around a transformers model."""

    def __init__(self, base: nn.Module, width: int) -> None:
        super().__init__()
        self.base = base
        self.value = nn.Sequential(nn.Linear(32, width), nn.Tanh(), nn.Linear(width, 1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = self.value(self.base(input_ids=ids).last_hidden_state[:, -1])
        return values


def test_heads_of_ones_own_around_a_transformers_model() -> None:
    model = Around(small.model("LlamaModel"), 16)
    reference = copy.deepcopy(model)
    ciphertune.outsource(model, "clear")
    assert type(model.value[0]) is type(model.value[2]) is nn.Linear
    assert len(ciphertune.outsourced_layers(model)) == 14
    torch.testing.assert_close(model(small.ids()), reference(small.ids()), rtol=1e-4, atol=1e-4)
    # A second call does not take the head for the larger part.
    assert outside_base_models(model) >= {id(model.value[0]), id(model.value[2])}
    # Most of the weights are no head.
    large = ciphertune.outsource(Around(small.model("LlamaModel"), 2048), "clear")
    assert "value.0" in {layer.name for layer in ciphertune.outsourced_layers(large)}


def test_bare_models_and_modules_have_no_heads() -> None:
    assert outside_base_models(nn.Sequential(nn.Linear(2, 2))) == set()
    assert outside_base_models(small.model("BertModel")) == set()
    pooler = ciphertune.outsource(small.model("BertModel"), "clear").pooler.dense
    assert isinstance(pooler, ciphertune.OutsourcedLinear)
