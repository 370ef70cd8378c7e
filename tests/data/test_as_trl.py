"""Sequences and labels are those that TRL's SFTTrainer makes of the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import llama, save_letters

from ciphertune.data.examples import Columns, examples_of, form_of
from ciphertune.data.render import IGNORED, Renderer
from ciphertune.data.rows import Row
from ciphertune.data.sequences import Collator, apart, padding

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<end>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


DATA: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": "one two"}, {"text": "three"}, {"text": "a longer one that is cut"}],
    "messages": [{"messages": turns("Hi?", "Yes.")}, {"messages": turns("So?", "No.", "Why?", "I do not know.")}],
    "conversations": [{"conversations": [{"from": "user", "value": "Hi?"}, {"from": "assistant", "value": "Yes."}]}],
    "completion": [{"prompt": "one", "completion": " two"}, {"prompt": "a longer one", "completion": " is cut here"}],
    "turns": [{"prompt": turns("Hi?"), "completion": [{"role": "assistant", "content": "Yes."}]}],
}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("text", {}),
        ("messages", {}),
        ("messages", {"assistant_only_loss": True}),
        ("conversations", {}),
        ("completion", {}),
        ("completion", {"completion_only_loss": False}),
        ("turns", {}),
        ("turns", {"completion_only_loss": False}),
        ("turns", {"assistant_only_loss": True}),
    ],
)
@pytest.mark.parametrize("length", [40, 1024])
def test_sequences_and_labels(name: str, options: dict[str, bool], length: int, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from transformers import AutoTokenizer

    save_letters(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.pad_token, tokenizer.chat_template = tokenizer.eos_token, TEMPLATE
    settings = trl.SFTConfig(
        str(tmp_path / "out"), max_length=length, report_to="none", use_cpu=True, bf16=False, shuffle_dataset=False,
        gradient_checkpointing=False, per_device_train_batch_size=8, **options,
    )  # fmt: skip
    data = datasets.Dataset.from_list(DATA[name])
    trainer = trl.SFTTrainer(llama(vocab_size=97), settings, train_dataset=data, processing_class=tokenizer)
    wanted = trainer.data_collator(list(trainer.train_dataset))

    rows = [Row(f"row {number}", fields) for number, fields in enumerate(DATA[name])]
    form = form_of(rows, Columns())
    render = Renderer(
        tokenizer,
        form,
        completion_only=options.get("completion_only_loss"),
        assistant_only=options.get("assistant_only_loss", False),
    )
    sequences, _ = apart([render(example) for example in examples_of(rows, form, Columns())], length)
    found = Collator(padding(tokenizer))(sequences)
    assert any(label != IGNORED for label in found["labels"].flatten().tolist())
    for key in ("input_ids", "labels"):
        assert found[key].tolist() == wanted[key].tolist()
