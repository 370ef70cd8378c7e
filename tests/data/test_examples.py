"""What a row is an example of, and the tokens and labels that come of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import TEMPLATE, save_letters

from ciphertune.data.examples import Columns, Example, examples_of, form_of
from ciphertune.data.render import IGNORED, Renderer, Tokens, use_template
from ciphertune.data.rows import Row
from ciphertune.data.sequences import Collator, apart, joined, padding
from ciphertune.errors import ConfigError

TURNS = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
SHARED = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}]


def rows_of(*fields: dict[str, Any]) -> list[Row]:
    return [Row(f"line {number} of a.jsonl", each) for number, each in enumerate(fields, 1)]


def example_of(fields: dict[str, Any], **columns: str) -> Example:
    rows = rows_of(fields)
    return examples_of(rows, form_of(rows, Columns(**columns)), Columns(**columns))[0]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    save_letters(folder)
    made = AutoTokenizer.from_pretrained(folder)
    made.chat_template = TEMPLATE
    return made


@pytest.mark.parametrize(
    ("fields", "columns", "wanted"),
    [
        ({"text": "a"}, {}, (None, "a")),
        ({"body": "a", "text": "b"}, {"text": "body"}, (None, "a")),
        ({"messages": TURNS}, {}, (None, TURNS)),
        ({"messages": json.dumps(TURNS)}, {}, (None, TURNS)),
        ({"conversations": SHARED, "id": 3}, {}, (None, TURNS)),
        ({"prompt": "a", "completion": "b"}, {}, ("a", "b")),
        ({"q": "a", "a": "b", "text": "c"}, {"prompt": "q", "completion": "a"}, ("a", "b")),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, {}, (TURNS[:1], TURNS[1:])),
        ({"instruction": "Hi?", "input": "", "output": "Yes."}, {}, (TURNS[:1], TURNS[1:])),
        ({"instruction": "Hi?", "output": "Yes.", "text": "all of it"}, {}, (TURNS[:1], TURNS[1:])),
        ({"instruction": "Hi?", "output": "Yes.", "text": "all of it"}, {"text": "text"}, (None, "all of it")),
        (
            {"instruction": "Hi", "input": "x", "output": "Yes.", "system": "Be."},
            {},
            ([{"role": "system", "content": "Be."}, {"role": "user", "content": "Hi\n\nx"}], TURNS[1:]),
        ),
        ({"messages": [{"role": "User", "content": [{"type": "text", "text": "Hi?"}]}]}, {}, (None, TURNS[:1])),
        ({"messages": [{**TURNS[0], "tool_calls": None}]}, {}, (None, TURNS[:1])),
    ],
)
def test_forms(fields: dict[str, Any], columns: dict[str, str], wanted: tuple[Any, Any]) -> None:
    found = example_of(fields, **columns)
    assert (found.prompt, found.completion) == wanted


@pytest.mark.parametrize(
    ("fields", "columns", "said"),
    [
        ({"body": "SECRET"}, {}, "line 1 of a.jsonl has the field 'body', and none of these is known"),
        ({"SECRET of a patient": "x"}, {}, "(a name of 19 letters)"),
        ({"text": "SECRET"}, {"text": "body"}, "no field 'body', but the field 'text': set data.text_field"),
        ({"text": 3}, {}, "'text' holds no text"),
        ({"text": "SECRET", "q": "x"}, {"prompt": "q"}, "set both"),
        ({"text": "cut \ud83d"}, {}, "half of a character"),
        ({"messages": []}, {}, "not empty"),
        ({"messages": "SECRET"}, {}, "no JSON list"),
        ({"messages": [{"content": "SECRET"}]}, {}, "message 1 of 'messages' has no role, but the field 'content'"),
        ({"messages": [*TURNS, {"role": "narrator", "content": "SECRET"}]}, {}, "message 3"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, {}, "such as an image"),
        ({"messages": [{"role": "user", "content": None}]}, {}, "no content that is a text"),
        ({"prompt": "SECRET", "completion": None}, {}, "'completion' holds no text"),
        ({"prompt": "SECRET", "completion": TURNS}, {}, "must both be texts, or both lists"),
        ({"instruction": "SECRET", "output": 3}, {}, "'output' holds no text"),
        ({"messages": TURNS, "tools": "SECRET"}, {}, "'tools' is a text that is no JSON"),
    ],
)
def test_rows_that_are_no_examples(fields: dict[str, Any], columns: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        example_of(fields, **columns)
    assert said in str(caught.value)
    assert "SECRET" not in str(caught.value)


def test_a_later_row_that_lacks_the_field_is_named() -> None:
    rows = rows_of({"text": "a"}, {"text": " "}, {"txt": "b"})
    with pytest.raises(ConfigError, match="line 3 of a.jsonl: the field 'text' is missing; it has the field 'txt'"):
        examples_of(rows, "text", Columns())
    assert [example.completion for example in examples_of(rows[:2], "text", Columns())] == ["a"]


def learned(tokenizer: Any, fields: dict[str, Any], **options: Any) -> str:
    """A row as it is fed, with an underscore for a token that is not learned, and a dollar for the end of a turn."""
    rows = rows_of(fields)
    form = form_of(rows, Columns())
    tokens = Renderer(tokenizer, form, **options)(examples_of(rows, form, Columns())[0])
    letters = [tokenizer.convert_ids_to_tokens(token) for token in tokens.ids]
    assert all(label in (token, IGNORED) for token, label in zip(tokens.ids, tokens.labels, strict=True))
    mask = [letter if label != IGNORED else "_" for letter, label in zip(letters, tokens.labels, strict=True)]
    return "".join(mask).replace("<end>", "$")


LONGER = [*TURNS, {"role": "user", "content": "So?"}, {"role": "assistant", "content": "No."}]


@pytest.mark.parametrize(
    ("fields", "options", "wanted"),
    [
        ({"text": "abc"}, {}, "abc$"),
        ({"prompt": "ab", "completion": "cd"}, {}, "__cd$"),
        ({"prompt": "ab", "completion": "cd"}, {"completion_only": False}, "abcd$"),
        ({"messages": TURNS}, {}, "<user>Hi?$<assistant>Yes.$"),
        ({"messages": LONGER}, {"assistant_only": True}, "_" * 21 + "Yes.$" + "_" * 21 + "No.$"),
        ({"instruction": "Hi?", "output": "Yes."}, {}, "_" * 21 + "Yes.$"),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, {"completion_only": False}, "<user>Hi?$<assistant>Yes.$"),
    ],
)
def test_what_is_learned(tokenizer: Any, fields: dict[str, Any], options: dict[str, Any], wanted: str) -> None:
    assert learned(tokenizer, fields, **options) == wanted


@pytest.mark.parametrize(
    ("fields", "options", "said"),
    [
        ({"text": "a"}, {"completion_only": True}, "these are texts"),
        ({"messages": TURNS}, {"completion_only": True}, "these are conversations: set data.assistant_only_loss"),
        ({"text": "a"}, {"assistant_only": True}, "these are texts"),
        ({"prompt": "a", "completion": "b"}, {"assistant_only": True}, "prompts and completions are texts"),
        ({"messages": TURNS[:1]}, {"assistant_only": True}, "line 1 of a.jsonl has no turn of the assistant"),
    ],
)
def test_a_loss_that_does_not_fit_the_data(
    tokenizer: Any, fields: dict[str, Any], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        learned(tokenizer, fields, **options)


def test_chat_templates(tokenizer: Any, tmp_path: Path) -> None:
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = None
    with pytest.raises(ConfigError, match="no chat template, .* data.chat_template_path"):
        learned(other, {"messages": TURNS})
    (tmp_path / "a.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    use_template(other, str(tmp_path / "a.jinja"))
    with pytest.raises(ConfigError, match="line 1 of a.jsonl: the chat template refuses it: roles must alternate"):
        learned(other, {"messages": TURNS})
    # One that says something else of a turn once others follow: the assistant's tokens cannot be told.
    other.chat_template = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(ConfigError, match="renders a conversation in another way"):
        learned(other, {"messages": LONGER}, assistant_only=True)
    with pytest.raises(ConfigError, match=r"chat_template_path: cannot read .*none\.jinja"):
        use_template(other, str(tmp_path / "none.jinja"))


def test_a_prompt_that_changes_with_its_completion_is_counted(tokenizer: Any) -> None:
    def pairs(text: str, **options: Any) -> Any:
        return {"input_ids": [ord(text[at]) * 256 + ord(text[at : at + 2][-1]) for at in range(0, len(text), 2)]}

    class Pairs:
        eos_token_id = 1
        __call__ = staticmethod(pairs)

    render = Renderer(Pairs(), "completion")
    tokens = render(Example("line 1", "abc", "de"))
    assert tokens.labels == [IGNORED, *tokens.ids[1:]]
    assert render.moved == 1
    render(Example("line 2", "ab", "de"))
    assert render.moved == 1


def tokens(length: int, learned_from: int = 0) -> Tokens:
    ids = list(range(length))
    return Tokens(ids, [IGNORED] * learned_from + ids[learned_from:])


def test_one_sequence_for_each_example_and_what_is_lost() -> None:
    rows, cut = apart([tokens(5), tokens(9, 2), tokens(9, 7), tokens(1)], 6)
    assert [len(row.ids) for row in rows] == [5, 6]
    assert rows[1].labels == [IGNORED, IGNORED, 2, 3, 4, 5]
    assert cut.told(6) == (
        "2 of 4 examples are longer than 6 tokens (the longest has 9) and were cut; "
        "2 left out, since nothing of them is learned within 6 tokens"
    )
    assert apart([tokens(5)], 6)[1].told(6) == ""


def test_joined_examples() -> None:
    rows, cut = joined([tokens(5, 2), tokens(4, 1), tokens(2)], 4)
    assert [row.ids for row in rows] == [[0, 1, 2, 3], [4, 0, 1, 2]]
    assert [row.labels for row in rows] == [[IGNORED, IGNORED, 2, 3], [4, IGNORED, 1, 2]]
    assert cut.told(4) == "3 tokens at the end fill no sequence and were left out"


def test_batches_are_padded_at_their_end() -> None:
    batch = Collator(9, 4)([tokens(2), tokens(5, 1)])
    assert batch["input_ids"].tolist() == [[0, 1, *[9] * 6], [0, 1, 2, 3, 4, 9, 9, 9]]
    assert batch["labels"].tolist() == [[0, 1, *[IGNORED] * 6], [IGNORED, 1, 2, 3, 4, *[IGNORED] * 3]]
    assert batch["attention_mask"].sum(1).tolist() == [2, 5]
    assert Collator(9)([tokens(2), tokens(5)])["input_ids"].shape == (2, 5)


def test_the_token_to_pad_with(tokenizer: Any) -> None:
    assert padding(tokenizer) == tokenizer.eos_token_id
