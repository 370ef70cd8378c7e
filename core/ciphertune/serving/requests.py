"""What a request asks for, read from its body and checked field by field."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NoReturn

from ciphertune.serving.request_error import RequestError

_MOST_CHOICES = 8
_MOST_STOPS = 4
_MOST_BIASES = 300
_MOST_TOP = 20

# Fields that change nothing that is computed here.
_IGNORED = {
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
    "service_tier", "store", "user",
}  # fmt: skip
_SHARED = {
    "frequency_penalty", "logit_bias", "logprobs", "max_tokens", "model", "n", "presence_penalty",
    "repetition_penalty", "seed", "stop", "stream", "stream_options", "temperature", "top_k", "top_p",
}  # fmt: skip
_CHAT = {"max_completion_tokens", "messages", "response_format", "tool_choice", "tools", "top_logprobs"}
_COMPLETION = {"best_of", "echo", "prompt"}
_ROLES = ("assistant", "developer", "system", "tool", "user")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. None stands for what the model's own configuration says.

    Attributes:
        temperature: 0 for the likeliest token.
        top_p, top_k, repetition_penalty: as in transformers.
        frequency_penalty, presence_penalty: taken off the logits of tokens that the answer holds already.
        logit_bias: added to logits, by token.
        seed: of the random generator; None for one of the system's.
        top_logprobs: number of likeliest tokens that are told at each place; None for no log-probabilities.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    seed: int | None = None
    top_logprobs: int | None = None


@dataclasses.dataclass(frozen=True)
class Asked:
    """What both kinds of requests have in common.

    Attributes:
        model: the name that was asked for.
        sampling: how tokens are chosen.
        max_tokens: of each answer; None for as many as there may be.
        choices: answers to each prompt.
        stops: texts that end an answer.
        stream: whether it is sent piece by piece, and ``usage`` whether the counts of tokens come at its end.
    """

    model: str
    sampling: Sampling
    max_tokens: int | None
    choices: int
    stops: tuple[str, ...]
    stream: bool
    usage: bool


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """A request of /v1/chat/completions.

    Attributes:
        asked: see there.
        messages: as chat templates take them.
        tools: as chat templates take them; none where the request forbids calls.
    """

    asked: Asked
    messages: list[dict[str, Any]] = dataclasses.field(repr=False)
    tools: list[dict[str, Any]] = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class CompletionRequest:
    """A request of /v1/completions.

    Attributes:
        asked: see there.
        prompts: texts, or numbers of tokens.
    """

    asked: Asked
    prompts: list[str | list[int]] = dataclasses.field(repr=False)


def read_json(content: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises ``RequestError``."""
    try:
        body = json.loads(content, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise RequestError("the body is not JSON", code="invalid_json") from None
    if not isinstance(body, dict):
        raise RequestError("the body is not a JSON object", code="invalid_json")
    return body


def parse_chat(body: Mapping[str, Any]) -> ChatRequest:
    """Read a request of /v1/chat/completions. Raises ``RequestError``."""
    _refuse_unknown(body, _CHAT)
    form = body.get("response_format")
    if form is not None and form != {"type": "text"}:
        _refuse(
            "response_format",
            "answers are text, which nothing holds to JSON or to a schema: leave it out, ask for it in a message, "
            "and check the answer",
        )
    top = _whole(body, "top_logprobs", 0, _MOST_TOP)
    wanted = _flag(body, "logprobs")
    if top is not None and not wanted:
        _refuse("top_logprobs", "it needs logprobs: true")
    tools = _tools(body)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        _refuse("messages", "a list of at least one message is expected")
    limit = _whole(body, "max_completion_tokens", 1, 1 << 30)
    asked = _asked(body, limit, (top or 0) if wanted else None)
    return ChatRequest(asked, [_message(each, i) for i, each in enumerate(messages)], tools)


def parse_completion(body: Mapping[str, Any]) -> CompletionRequest:
    """Read a request of /v1/completions. Raises ``RequestError``."""
    _refuse_unknown(body, _COMPLETION)
    if _flag(body, "echo"):
        _refuse("echo", "it is not supported")
    _whole(body, "best_of", 1, 1)
    prompt = body.get("prompt")
    prompts: list[Any] = prompt if isinstance(prompt, list) and not _are_tokens(prompt) else [prompt]
    if not prompts or not all(isinstance(each, str) or _are_tokens(each) for each in prompts):
        _refuse("prompt", "a text, a list of texts, or of numbers of tokens is expected")
    if len(prompts) > _MOST_CHOICES:
        _refuse("prompt", f"{len(prompts)} prompts are more than the {_MOST_CHOICES} of one request")
    return CompletionRequest(_asked(body, None, _whole(body, "logprobs", 0, 5)), list(prompts))


def _asked(body: Mapping[str, Any], limit: int | None, top: int | None) -> Asked:
    model = body.get("model")
    if not isinstance(model, str):
        _refuse("model", "the name of a model is expected; /v1/models lists them")
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        _refuse("stream_options", "an object is expected")
    stream = _flag(body, "stream")
    return Asked(
        model=model,
        sampling=Sampling(
            temperature=_number(body, "temperature", 0, 2),
            top_p=_number(body, "top_p", 0, 1),
            top_k=_whole(body, "top_k", 0, 1 << 30),
            repetition_penalty=_number(body, "repetition_penalty", 0.01, 100),
            frequency_penalty=_number(body, "frequency_penalty", -2, 2) or 0.0,
            presence_penalty=_number(body, "presence_penalty", -2, 2) or 0.0,
            logit_bias=_biases(body),
            seed=_whole(body, "seed", -(1 << 63), (1 << 63) - 1),
            top_logprobs=top,
        ),
        max_tokens=limit if limit is not None else _whole(body, "max_tokens", 1, 1 << 30),
        choices=_whole(body, "n", 1, _MOST_CHOICES) or 1,
        stops=_stops(body),
        stream=stream,
        usage=stream and _flag(options or {}, "include_usage"),
    )


def _message(message: Any, place: int) -> dict[str, Any]:
    """One message as a chat template takes it: its content is one text, arguments of calls are objects."""
    where = f"messages.{place}"
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        _refuse(where, f"a message with a role is expected: {', '.join(_ROLES)}")
    content = message.get("content")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if not all(isinstance(part, str) for part in parts):
            _refuse(f"{where}.content", "this model takes text alone")
        content = "".join(part for part in parts if part is not None)
    calls = message.get("tool_calls")
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        _refuse(f"{where}.content", "a text is expected")
    found = {"role": message["role"], "content": content}
    for name in ("name", "tool_call_id"):
        if name in message:
            if not isinstance(message[name], str):
                _refuse(f"{where}.{name}", "a text is expected")
            found[name] = message[name]
    if calls is not None:
        if not isinstance(calls, list):
            _refuse(f"{where}.tool_calls", "a list is expected")
        found["tool_calls"] = [_call(call, f"{where}.tool_calls.{i}") for i, call in enumerate(calls)]
    return found


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        _refuse(where, "a call of a function with a name is expected")
    arguments = function.get("arguments", "{}")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            _refuse(f"{where}.function.arguments", "they are not JSON")
    return {"id": call.get("id"), "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tools(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    choice = body.get("tool_choice")
    if choice not in (None, "auto", "none"):
        _refuse("tool_choice", "'auto' and 'none' are supported: no call can be forced")
    tools = body.get("tools")
    if tools is None:
        return []
    if not isinstance(tools, list):
        _refuse("tools", "a list is expected")
    for place, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            _refuse(f"tools.{place}", "a function with a name is expected")
    return [] if choice == "none" else tools


def _stops(body: Mapping[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop")
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(each, str) and each for each in stops):
        _refuse("stop", "a text or a list of texts is expected")
    if len(stops) > _MOST_STOPS:
        _refuse("stop", f"at most {_MOST_STOPS} texts are taken")
    return tuple(stops)


def _biases(body: Mapping[str, Any]) -> dict[int, float]:
    given = body.get("logit_bias") or {}
    if not isinstance(given, dict) or len(given) > _MOST_BIASES:
        _refuse("logit_bias", f"an object of at most {_MOST_BIASES} numbers is expected")
    found = {}
    for token in given:
        if not token.isdecimal() or len(token) > 9:
            _refuse("logit_bias", "a name is not the number of a token")
        bias = _number(given, token, -100, 100, "logit_bias")
        found[int(token)] = 0.0 if bias is None else bias
    return found


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) is int for each in value)


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        _refuse(name, "true or false is expected")
    return bool(value)


def _number(body: Mapping[str, Any], name: str, least: float, most: float, field: str = "") -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        _refuse(field or name, f"a number between {least:g} and {most:g} is expected")
    return float(value)


def _whole(body: Mapping[str, Any], name: str, least: int, most: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if type(value) is not int or not least <= value <= most:
        _refuse(name, f"a whole number {'of' if least == most else 'between'} {_between(least, most)} is expected")
    return value


def _between(least: int, most: int) -> str:
    return str(least) if least == most else f"{least} and {most}"


def _refuse_unknown(body: Mapping[str, Any], own: set[str]) -> None:
    for name, value in body.items():
        if value is not None and name not in _SHARED | _IGNORED | own:
            # Its name is the caller's own word, so it is not repeated at any length.
            _refuse(name[:64], "this field is not supported")


def _refuse_constant(_: str) -> NoReturn:
    raise ValueError


def _refuse(param: str, message: str) -> NoReturn:
    raise RequestError(f"{param}: {message}", code="invalid_value", param=param)
