"""What a row is an example of: a text, a conversation, a prompt with its completion, or a text with a label."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ciphertune.data.files import check_letters, named
from ciphertune.data.rows import Row
from ciphertune.errors import ConfigError

Message = Mapping[str, Any]
"""A turn of a conversation as chat templates take it: ``role``, ``content``, perhaps more."""
Form = Literal["text", "messages", "completion", "instruction"]

_CONVERSATIONS = ("messages", "conversations")
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
}
"""Names of roles that are in use beside those of chat templates."""
_KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclasses.dataclass(frozen=True)
class Columns:
    """Names of columns that were given; None for those that are looked for.

    Attributes:
        text: column of a whole text.
        prompt, completion: columns of what is answered, and of the answer.
    """

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None


@dataclasses.dataclass(frozen=True)
class Example:
    """An example for a language model.

    Attributes:
        place: where it stands, for messages.
        prompt: text or turns that the completion follows; None where there is none.
        completion: text or turns; of a conversation without a prompt all of them.
        tools: for the chat template.
    """

    place: str
    prompt: str | Sequence[Message] | None
    completion: str | Sequence[Message]
    tools: Any = None


def form_of(rows: Sequence[Row], columns: Columns) -> Form:
    """What the rows are, by the names of the columns of the first.

    Raises:
        ConfigError: it has no column of a known name, or none of a name that was given.
    """
    fields = rows[0].fields
    if (columns.prompt is None) != (columns.completion is None):
        raise ConfigError("data.prompt_field and data.completion_field go together: set both")
    if columns.text is not None and columns.prompt is not None:
        raise ConfigError("data.text_field is for whole texts: leave it out beside data.prompt_field")
    for key, name in (
        ("text_field", columns.text),
        ("prompt_field", columns.prompt),
        ("completion_field", columns.completion),
    ):
        if name is not None and name not in fields:
            raise ConfigError(f"{rows[0].place} has no field {name!r}, but {named(fields)}: set data.{key}")
    if columns.text is not None:
        return "text"
    if columns.prompt is not None:
        return "completion"
    if any(isinstance(fields.get(name), (list, str)) for name in _CONVERSATIONS):
        return "messages"
    if "prompt" in fields and "completion" in fields:
        return "completion"
    if "instruction" in fields and "output" in fields:
        return "instruction"
    if "text" in fields:
        return "text"
    raise ConfigError(
        f"{rows[0].place} has {named(fields)}, and none of these is known: 'text'; 'messages'; 'conversations'; "
        "'prompt' and 'completion'; 'instruction' and 'output'. Say which one is the text in data.text_field, or which "
        "two are question and answer in data.prompt_field and data.completion_field"
    )


def examples_of(rows: Sequence[Row], form: Form, columns: Columns) -> list[Example]:
    """Examples for a language model, without those whose text is blank.

    Raises:
        ConfigError: a row lacks a column, or holds something else in it. Nothing of it is quoted.
    """
    found = []
    for row in rows:
        if form == "text":
            text = text_in(row, columns.text or "text", "text_field")
            if text.strip():
                found.append(Example(row.place, None, text))
        elif form == "instruction":
            found.append(_instruction(row))
        elif form == "completion":
            found.append(_completion(row, columns.prompt or "prompt", columns.completion or "completion"))
        else:
            name = next((name for name in _CONVERSATIONS if row.fields.get(name)), _CONVERSATIONS[0])
            turns = turns_in(row.fields.get(name), row, name)
            found.append(Example(row.place, None, turns, _tools(row)))
    if not found:
        raise ConfigError("data.source holds no text: every row is blank")
    return found


def text_in(row: Row, name: str, key: str) -> str:
    """The text in a column of a row.

    Args:
        row: what holds it.
        name: of the column.
        key: in ``[data]`` that names the column.

    Raises:
        ConfigError: there is none.
    """
    value = row.fields.get(name)
    if not isinstance(value, str):
        if name in row.fields:
            what = "null" if value is None else type(value).__name__
            raise ConfigError(
                f"{row.place}: the field {name!r} holds no text ({what}): leave the row out, or set data.{key}"
            )
        raise ConfigError(f"{row.place}: the field {name!r} is missing; it has {named(row.fields)}: set data.{key}")
    check_letters(value, row.place)
    return value


def _instruction(row: Row) -> Example:
    asked = text_in(row, "instruction", "prompt_field")
    more = row.fields.get("input")
    if more not in (None, ""):
        asked = f"{asked}\n\n{text_in(row, 'input', 'prompt_field')}"
    turns: list[Message] = [{"role": "user", "content": asked}]
    if row.fields.get("system"):
        turns.insert(0, {"role": "system", "content": text_in(row, "system", "prompt_field")})
    answer = text_in(row, "output", "completion_field")
    return Example(row.place, turns, [{"role": "assistant", "content": answer}])


def _completion(row: Row, prompt: str, completion: str) -> Example:
    asked, answer = row.fields.get(prompt), row.fields.get(completion)
    if isinstance(asked, str) and isinstance(answer, str):
        return Example(row.place, text_in(row, prompt, "prompt_field"), text_in(row, completion, "completion_field"))
    if isinstance(asked, list) and isinstance(answer, list):
        return Example(row.place, turns_in(asked, row, prompt), turns_in(answer, row, completion), _tools(row))
    for name, value, key in ((prompt, asked, "prompt_field"), (completion, answer, "completion_field")):
        if not isinstance(value, (str, list)):
            text_in(row, name, key)  # says what is wrong
    raise ConfigError(f"{row.place}: {prompt!r} and {completion!r} must both be texts, or both lists of messages")


def _tools(row: Row) -> Any:
    tools = row.fields.get("tools")
    if not isinstance(tools, str):
        return tools or None
    try:
        return json.loads(tools) if tools.strip() else None
    except (ValueError, RecursionError):
        raise ConfigError(f"{row.place}: the field 'tools' is a text that is no JSON") from None


def turns_in(value: Any, row: Row, name: str) -> list[Message]:
    """The turns of a conversation that a field holds, as a list or as JSON of one.

    Args:
        value: of the field.
        row: that has it.
        name: of the field.

    Raises:
        ConfigError: it is no list of messages. Nothing of it is quoted.
    """
    if isinstance(value, str):  # a list in a cell of a table
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ConfigError(f"{row.place}: the field {name!r} is a text that is no JSON list of messages") from None
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{row.place}: the field {name!r} must be a list of messages, and not empty")
    return [_turn(turn, f"{row.place}: message {number} of {name!r}") for number, turn in enumerate(value, 1)]


def _turn(turn: Any, place: str) -> Message:
    if not isinstance(turn, Mapping):
        raise ConfigError(f"{place} is not an object with a role and a content")
    # Columnar files fill in None where another row has a value.
    kept = {key: value for key, value in turn.items() if value is not None}
    role = kept.pop("role", kept.pop("from", None))
    content = kept.pop("content", kept.pop("value", None))
    if not isinstance(role, str):
        raise ConfigError(f"{place} has no role, but {named(turn)}: 'role' and 'content' (or 'from', 'value') expected")
    role = _ROLES.get(role.lower(), role.lower())
    if role not in _KNOWN_ROLES:
        known = ", ".join((*_KNOWN_ROLES, *_ROLES))
        raise ConfigError(f"{place} has a role that is not known, of {len(role)} letters. Known: {known}")
    if isinstance(content, list):
        content = _parts(content, place)
    if content is None and role == "assistant" and "tool_calls" in kept:
        content = ""
    if not isinstance(content, str):
        raise ConfigError(f"{place} has no content that is a text")
    check_letters(content, place)
    return {"role": role, "content": content, **kept}


def _parts(parts: Sequence[Any], place: str) -> str:
    texts = [part.get("text") for part in parts if isinstance(part, Mapping) and part.get("type") == "text"]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"{place} holds something other than text, such as an image: only text is trained on")
    return "".join(map(str, texts))
