"""The server, asked by the openai client."""

import http.client
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
import torch
from served_model import KEYS, SECRET, ask, batch, until

import ciphertune
from ciphertune.errors import ConfigError, SecurityError, TransportError
from ciphertune.plugins import registry
from ciphertune.serving.server import Server
from ciphertune.serving.settings import ServeSettings
from ciphertune_clear import ClearBackend

Serve = Callable[..., Server]
Client = Callable[..., openai.OpenAI]

UNSUPPORTED: dict[str, Any] = {
    "function_call": "auto", "functions": [], "guided_json": {}, "min_p": 0.1, "modalities": ["text"], "prediction": {},
    "reasoning_effort": "low", "verbosity": "low", "web_search_options": {},
}  # fmt: skip
"""Fields that would change an answer, of the protocol and of other servers."""


def plain_text(model: Any, tokenizer: Any, text: str, tokens: int) -> str:
    """What transformers' ``generate`` answers, greedily."""
    ids = tokenizer.apply_chat_template(ask(text), add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        found = model.generate(**ids, max_new_tokens=tokens, do_sample=False, pad_token_id=96)
    answer: str = tokenizer.decode(found[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer


def raw(server: Server, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """One request as it stands: its reply's status, headers and body."""
    connection = http.client.HTTPConnection(urlsplit(server.address).netloc, timeout=60)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    reply = connection.getresponse()
    content = reply.read()
    connection.close()
    return reply.status, {name.lower(): value for name, value in reply.getheaders()}, content


class TestChat:
    def test_the_answer_is_that_of_generate(
        self, serve: Serve, client: Client, tokenizer: Any, letters: Callable[..., Any]
    ) -> None:
        found = client(serve()).chat.completions.create(model="tiny", messages=ask("Hello there"), max_tokens=12)
        assert found.choices[0].message.content == plain_text(letters(), tokenizer, "Hello there", 12)
        assert found.choices[0].message.role == "assistant"
        assert found.choices[0].finish_reason == "length"
        assert found.usage.completion_tokens == 12
        assert found.usage.prompt_tokens == len("<user>Hello there<assistant>") + 1

    def test_a_stream_is_the_same_in_pieces(self, serve: Serve, client: Client) -> None:
        asked: Any = {"model": "tiny", "messages": ask("Hello"), "max_tokens": 9}
        api = client(serve())
        whole = api.chat.completions.create(**asked)
        pieces = list(api.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        texts = [piece.choices[0].delta.content or "" for piece in pieces if piece.choices]
        assert "".join(texts) == whole.choices[0].message.content
        assert len([text for text in texts if text]) == 9
        assert pieces[0].choices[0].delta.role == "assistant"
        assert [p.choices[0].finish_reason for p in pieces if p.choices][-1] == "length"
        assert pieces[-1].usage == whole.usage
        assert len({piece.id for piece in pieces}) == 1

    def test_without_a_limit_it_ends_where_the_server_or_the_model_does(self, serve: Serve, client: Client) -> None:
        create = client(serve()).chat.completions.create
        assert create(model="tiny", messages=ask("Hello")).usage.completion_tokens == 32
        assert create(model="tiny", messages=ask("a" * 230)).usage.completion_tokens == 256 - 230 - 18

    def test_texts_and_tokens_that_end_it(self, serve: Serve, client: Client, script: Callable[[str], None]) -> None:
        script("one two three")
        create = client(serve()).chat.completions.create
        found = create(model="tiny", messages=ask("?")).choices[0]
        assert (found.message.content, found.finish_reason) == ("one two three", "stop")
        stream = create(model="tiny", messages=ask("?"), stop=["wo", "zebra"], stream=True)
        assert "".join(piece.choices[0].delta.content or "" for piece in stream) == "one t"

    def test_several_answers_from_a_seed(self, serve: Serve, client: Client) -> None:
        asked: Any = {"model": "tiny", "messages": ask("Hi"), "max_tokens": 8, "temperature": 1.5, "n": 3, "seed": 4}
        api = client(serve())
        first, again = (api.chat.completions.create(**asked) for _ in range(2))
        texts = [choice.message.content for choice in first.choices]
        assert texts == [choice.message.content for choice in again.choices]
        assert len(set(texts)) == 3
        assert first.usage.completion_tokens == 24
        stream = list(api.chat.completions.create(**asked, stream=True))
        for index, text in enumerate(texts):
            own = [p.choices[0].delta.content or "" for p in stream if p.choices[0].index == index]
            assert "".join(own) == text

    def test_messages_in_parts_and_of_all_roles(self, serve: Serve, client: Client) -> None:
        create = client(serve()).chat.completions.create
        parts: Any = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
        one = create(model="tiny", messages=[{"role": "user", "content": parts}], max_tokens=4)
        assert one.choices == create(model="tiny", messages=ask("Hello"), max_tokens=4).choices
        talk: Any = [{"role": "system", "content": "s"}, *ask("u"), {"role": "assistant", "content": "a"}, *ask("v")]
        assert create(model="tiny", messages=talk, max_tokens=1).usage.prompt_tokens > 30


class TestCompletions:
    def test_prompts_of_texts_and_tokens(self, serve: Serve, client: Client) -> None:
        create = client(serve()).completions.create
        both = create(model="tiny", prompt=["abc", "z"], max_tokens=5)
        assert [choice.index for choice in both.choices] == [0, 1]
        alone = create(model="tiny", prompt=[65, 66, 67], max_tokens=5)
        assert alone.choices[0].text == both.choices[0].text
        assert both.usage.prompt_tokens == 4
        stream = create(model="tiny", prompt="abc", max_tokens=5, stream=True)
        assert "".join(piece.choices[0].text for piece in stream) == alone.choices[0].text

    def test_log_probabilities(self, serve: Serve, client: Client) -> None:
        found = client(serve()).completions.create(model="tiny", prompt="abc", max_tokens=3, logprobs=2)
        told: Any = found.choices[0].logprobs
        assert len(told.tokens) == len(told.token_logprobs) == len(told.text_offset) == 3
        assert [max(top.values()) for top in told.top_logprobs] == told.token_logprobs


class TestLogProbabilities:
    def test_they_have_the_precision_of_bfloat16(
        self, serve: Serve, client: Client, tokenizer: Any, letters: Callable[..., Any]
    ) -> None:
        asked: Any = {"model": "tiny", "messages": ask("Hello"), "max_tokens": 4, "logprobs": True, "top_logprobs": 5}
        api = client(serve())
        whole = api.chat.completions.create(**asked).choices[0].logprobs.content
        stream = api.chat.completions.create(**asked, stream=True)
        pieces = [place for p in stream if (told := p.choices[0].logprobs) for place in told.content]
        assert [place.model_dump() for place in pieces] == [place.model_dump() for place in whole]
        ids = tokenizer.apply_chat_template(ask("Hello"), add_generation_prompt=True, return_dict=True)["input_ids"]
        with torch.no_grad():
            exact = torch.log_softmax(letters()(torch.tensor([ids])).logits[0, -1], 0)
        values = torch.tensor([place.logprob for place in whole[0].top_logprobs])
        assert torch.equal(values, values.to(torch.bfloat16).float())
        assert not torch.equal(values, exact.topk(5).values)
        assert torch.allclose(values, exact.topk(5).values, rtol=2**-8)
        assert len(whole) == 4
        assert whole[0].logprob == whole[0].top_logprobs[0].logprob
        assert bytes(whole[0].bytes).decode() == whole[0].token

    def test_none_are_told_unasked(self, serve: Serve, client: Client) -> None:
        found = client(serve()).chat.completions.create(model="tiny", messages=ask("Hello"), max_tokens=2)
        assert found.choices[0].logprobs is None


class TestModels:
    def test_the_list(self, serve: Serve, client: Client) -> None:
        api = client(serve())
        assert [model.id for model in api.models.list()] == ["tiny"]
        assert api.models.retrieve("tiny").id == "tiny"

    def test_another_name(self, serve: Serve, client: Client) -> None:
        api = client(serve())
        with pytest.raises(openai.NotFoundError, match="'tiny'"):
            api.models.retrieve("gpt-9")
        with pytest.raises(openai.NotFoundError, match="'tiny'"):
            api.chat.completions.create(model="gpt-9", messages=ask("Hello"))


class TestCallers:
    def test_a_wrong_key_and_none(self, serve: Serve, client: Client) -> None:
        server = serve(api_keys=KEYS)
        for key in ("wrong", "", KEYS[0][:-1], KEYS[0] + "x", "ünïcode"):
            status, headers, content = raw(
                server, "POST", "/v1/chat/completions", b"{", Authorization=f"Bearer {key}".encode().decode("latin-1")
            )
            assert status == 401
            assert headers["www-authenticate"] == "Bearer"
            assert json.loads(content)["error"]["code"] == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            client(server, "wrong-0123456789abcdef").models.list()
        assert raw(server, "GET", "/v1/models")[0] == 401
        assert all(len(list(client(server, key).models.list())) == 1 for key in KEYS)

    def test_other_sites_pages_are_refused(self, serve: Serve) -> None:
        server = serve()
        own = urlsplit(server.address).netloc
        port = own.rpartition(":")[2]
        for headers, status in (
            ({"Origin": "https://example.org"}, 403),
            ({"Origin": "null"}, 403),
            ({"Host": f"rebound.example.org:{port}"}, 403),
            ({"Host": "["}, 403),
            ({"Origin": f"http://{own}"}, 200),
            ({"Host": f"localhost:{port}"}, 200),
        ):
            assert raw(server, "GET", "/v1/models", b"", **headers)[0] == status, headers

    @pytest.mark.parametrize("keys", [(), KEYS])
    def test_eight_at_once(self, serve: Serve, client: Client, keys: tuple[str, ...]) -> None:
        server = serve(api_keys=keys)
        apis = [client(server, key) for key in keys or ("none",)]
        texts = [f"number {i} is {'x' * i}" for i in range(8)]
        together: list[set[str]] = []
        step = server._engine._decoder.step

        def watched() -> None:
            together.append({answer.caller for answer in batch(server)})
            most.append(len(batch(server)))
            step()

        most: list[int] = []
        server._engine._decoder.step = watched  # type: ignore[method-assign]

        def answer(i: int) -> str | None:
            api = apis[i % len(apis)]
            found = api.chat.completions.create(model="tiny", messages=ask(texts[i]), max_tokens=12)
            return found.choices[0].message.content

        alone = [answer(i) for i in range(8)]
        most.clear()
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(answer, range(8))) == alone
        assert max(most) > 1, "they were computed together"
        assert len(most) < 8 * 12
        assert any(len(callers) == max(len(keys), 1) for callers in together)

    def test_a_backend_with_one_secret_takes_one_key(self, serve: Serve, register: Any) -> None:
        class OneKey(ClearBackend):
            name = "one-key"
            separates_callers = False

        register(registry.BACKENDS, OneKey)
        serve("one-key", api_keys=KEYS[:1])
        with pytest.raises(SecurityError, match="a session for each caller"):
            serve("one-key", api_keys=KEYS)

    def test_callers_take_turns(self, serve: Serve, client: Client) -> None:
        server = serve(api_keys=KEYS, max_batch=1)
        order: list[str] = []
        join = server._engine._decoder.join

        def watched(answers: Any) -> None:
            order.extend(answer.caller for answer in answers)
            join(answers)

        server._engine._decoder.join = watched  # type: ignore[method-assign]

        def answer(key: str) -> None:
            client(server, key).chat.completions.create(model="tiny", messages=ask("Hello"), max_tokens=20)

        with ThreadPoolExecutor(8) as pool:
            many = [pool.submit(answer, KEYS[0]) for _ in range(7)]
            until(lambda: len(order) > 0)
            pool.submit(answer, KEYS[1]).result()
            [each.result() for each in many]
        assert order.index("key 2") < 7, "whoever asks seldom waits for one answer, not for seven"


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "param"),
        [
            ({"messages": []}, "messages"),
            ({"messages": "Hello"}, "messages"),
            ({"messages": [{"role": "king", "content": ""}]}, "messages.0"),
            ({"messages": [{"role": "user"}]}, "messages.0.content"),
            ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
            ({"model": None}, "model"),
            ({"temperature": 3}, "temperature"),
            ({"temperature": True}, "temperature"),
            ({"temperature": "1"}, "temperature"),
            ({"top_p": -1}, "top_p"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"max_tokens": 1.5}, "max_tokens"),
            ({"max_tokens": 33}, "max_tokens"),
            ({"n": 9}, "n"),
            ({"stop": [1]}, "stop"),
            ({"stop": list("abcde")}, "stop"),
            ({"stream": 1}, "stream"),
            ({"logit_bias": {"x": 1}}, "logit_bias"),
            ({"logit_bias": {"1": 101}}, "logit_bias"),
            ({"top_logprobs": 3}, "top_logprobs"),
            ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
            ({"response_format": {"type": "json_object"}}, "response_format"),
            ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format"),
            ({"response_format": "json"}, "response_format"),
            ({"tools": [{"type": "function"}]}, "tools.0"),
            ({"tools": [{"type": "function", "function": {"name": "add"}}]}, "tools"),
            ({"tool_choice": "required"}, "tool_choice"),
            ({"audio": {}}, "audio"),
            *(({name: value}, name) for name, value in UNSUPPORTED.items()),
        ],
    )
    def test_what_is_wrong_is_named(self, serve: Serve, changes: dict[str, Any], param: str) -> None:
        body = {"model": "tiny", "messages": ask(SECRET), **changes}
        status, _, content = raw(serve(), "POST", "/v1/chat/completions", json.dumps(body).encode())
        error = json.loads(content)["error"]
        assert (status, error["param"], error["type"]) == (400, param, "invalid_request_error")
        assert error["message"].startswith(f"{param}: ") or param in ("max_tokens", "tools"), (
            "said with numbers, in words"
        )
        assert SECRET not in content.decode()

    def test_fields_that_are_null_are_not_asked_for(self, serve: Serve) -> None:
        body = {"model": "tiny", "messages": ask("Hello"), "max_tokens": 1, **dict.fromkeys(UNSUPPORTED)}
        assert raw(serve(), "POST", "/v1/chat/completions", json.dumps(body).encode())[0] == 200

    @pytest.mark.parametrize(
        ("changes", "param"),
        [({"prompt": None}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": ["a"] * 9}, "prompt"),
         ({"prompt": [97]}, "prompt"), ({"prompt": [-1]}, "prompt"), ({"prompt": ""}, "prompt"),
         ({"echo": True}, "echo"), ({"best_of": 2}, "best_of"), ({"logprobs": 6}, "logprobs"),
         ({"messages": []}, "messages")],
    )  # fmt: skip
    def test_of_completions_too(self, serve: Serve, changes: dict[str, Any], param: str) -> None:
        body = {"model": "tiny", "prompt": "a", **changes}
        status, _, content = raw(serve(), "POST", "/v1/completions", json.dumps(body).encode())
        assert (status, json.loads(content)["error"]["param"]) == (400, param)

    def test_a_long_prompt_is_refused_before_anything_is_sent(self, serve: Serve, client: Client) -> None:
        server = serve(max_body=1 << 16)
        session = ciphertune.session_of(server._engine._decoder._model)
        create = client(server).chat.completions.create
        for text, tokens in (("a" * 300, None), ("a" * 230, 20)):
            with pytest.raises(openai.BadRequestError, match="256 positions") as caught:
                create(model="tiny", messages=ask(text), max_tokens=tokens)
            assert caught.value.code == "context_length_exceeded"
        assert session.traffic.requests == 0

    @pytest.mark.parametrize("body", [b"", b"{", b"[]", b"NaN", b"[" * 100_000, b"\xff", b'{"model": NaN}'])
    def test_what_is_no_json(self, serve: Serve, body: bytes) -> None:
        status, _, content = raw(serve(), "POST", "/v1/chat/completions", body)
        assert (status, json.loads(content)["error"]["code"]) == (400, "invalid_json")

    def test_a_long_body_is_not_read(self, serve: Serve, client: Client) -> None:
        server = serve(max_body=1000)
        with pytest.raises(openai.APIStatusError) as caught:
            client(server).chat.completions.create(model="tiny", messages=ask("a" * 1000))
        assert caught.value.status_code == 413
        connection = http.client.HTTPConnection(urlsplit(server.address).netloc, timeout=60)
        connection.request("POST", "/v1/completions", iter([b"x" * 600] * 2), encode_chunked=True)
        assert connection.getresponse().status == 413, "its length was not announced"
        connection.close()

    def test_too_many_that_wait(self, serve: Serve, client: Client) -> None:
        server = serve(api_keys=KEYS, max_batch=1, max_waiting=2)
        go_on = threading.Event()
        step = server._engine._decoder.step
        server._engine._decoder.step = lambda: (go_on.wait(60), step())  # type: ignore[assignment, method-assign]
        ann, bob = (client(server, key) for key in KEYS)

        def answer(api: openai.OpenAI) -> None:
            api.chat.completions.create(model="tiny", messages=ask("Hello"), max_tokens=2)

        with ThreadPoolExecutor(4) as pool:
            under_way = [pool.submit(answer, ann)]
            until(lambda: len(batch(server)) == 1)
            under_way += [pool.submit(answer, ann) for _ in range(2)]
            until(lambda: len(server._engine._waiting) == 2)
            with pytest.raises(openai.RateLimitError) as caught:
                answer(ann)
            assert caught.value.response.headers["retry-after"]
            under_way.append(pool.submit(answer, bob))
            until(lambda: len(server._engine._waiting) == 3)
            go_on.set()
            [each.result() for each in under_way]

    def test_other_paths_and_methods(self, serve: Serve) -> None:
        server = serve()
        for method, path, status in (("GET", "/v2", 404), ("GET", "/v1/completions", 405), ("POST", "/reset", 404)):
            found, _, content = raw(server, method, path)
            assert found == status
            assert json.loads(content)["error"]["type"] == "invalid_request_error"
        assert raw(server, "GET", "/health")[0] == 200

    def test_a_model_without_a_chat_template(self, serve: Serve, client: Client, tokenizer: Any) -> None:
        kept, tokenizer.chat_template = tokenizer.chat_template, None
        try:
            server = serve()
        finally:
            tokenizer.chat_template = kept
        with pytest.raises(openai.BadRequestError, match="/v1/completions"):
            client(server).chat.completions.create(model="tiny", messages=ask("Hello"))

    def test_a_template_that_refuses(self, serve: Serve, client: Client, tokenizer: Any) -> None:
        kept = tokenizer.chat_template
        tokenizer.chat_template = "{{ raise_exception('no ' + messages[0]['content']) }}"
        try:
            with pytest.raises(openai.BadRequestError) as caught:
                client(serve()).chat.completions.create(model="tiny", messages=ask(SECRET))
        finally:
            tokenizer.chat_template = kept
        assert caught.value.code == "template_error"
        assert SECRET not in str(caught.value)


class TestTools:
    TEMPLATE = "{% for t in tools or [] %}[{{ t['function']['name'] }}]{% endfor %}" + (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% for c in m['tool_calls'] or [] %}"
        "{{ c['function']['arguments']['a'] }}{% endfor %}{% endfor %}<assistant>"
    )
    FORM: dict[str, Any] = {  # noqa: RUF012
        "defaults": {"role": "assistant"}, "start_anchor": "<assistant>",
        "fields": {
            "tool_calls": {
                "open": "[[", "close": "]]", "repeats": True, "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {"content": "text"},
        },
    }  # fmt: skip
    ADD: dict[str, Any] = {  # noqa: RUF012
        "type": "function",
        "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
    }

    @pytest.fixture
    def calling(self, serve: Serve, tokenizer: Any, client: Client) -> Iterator[Any]:
        kept = tokenizer.chat_template
        tokenizer.chat_template, tokenizer.response_template = self.TEMPLATE, self.FORM
        try:
            yield client(serve(max_new_tokens=64)).chat.completions.create
        finally:
            tokenizer.chat_template = kept
            del tokenizer.response_template

    def test_a_call(self, calling: Any, script: Callable[[str], None]) -> None:
        script('[[{"name":"add","arguments":{"a":7}}]]')
        asked = {"model": "tiny", "messages": ask("7?"), "tools": [self.ADD]}
        choice = calling(**asked).choices[0]
        assert choice.finish_reason == "tool_calls"
        (call,) = choice.message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 7})
        pieces = list(calling(**asked, stream=True))
        told = [c for p in pieces for c in p.choices[0].delta.tool_calls or ()]
        assert [(c.index, c.function.name) for c in told] == [(0, "add")]
        assert pieces[-1].choices[0].finish_reason == "tool_calls"
        told = [{"role": "assistant", "tool_calls": [call.model_dump()]}]
        result = {"role": "tool", "tool_call_id": call.id, "content": "14"}
        assert calling(model="tiny", messages=[*ask("7?"), *told, result], tools=[self.ADD]).choices

    @pytest.mark.parametrize("text", ["no call", '[[{"name":"add",]]', '[[{"nam":1}]]', "[[[1]]]", "[["])
    def test_what_is_no_call_is_text(self, calling: Any, script: Callable[[str], None], text: str) -> None:
        script(text)
        choice = calling(model="tiny", messages=ask("?"), tools=[self.ADD]).choices[0]
        assert choice.finish_reason == "stop"
        assert not choice.message.tool_calls

    def test_calls_that_are_no_json(self, calling: Any) -> None:
        call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{" + SECRET}}
        with pytest.raises(openai.BadRequestError) as caught:
            calling(model="tiny", messages=[*ask("?"), {"role": "assistant", "tool_calls": [call]}])
        assert caught.value.param == "messages.1.tool_calls.0.function.arguments"
        assert SECRET not in str(caught.value)


class TestDisconnects:
    def test_of_a_stream(self, serve: Serve, client: Client) -> None:
        server = serve(max_new_tokens=200)
        with client(server).chat.completions.create(model="tiny", messages=ask("a"), stream=True) as stream:
            next(iter(stream))
            (answer,) = batch(server)
        until(lambda: not batch(server))
        assert answer.computed < 200

    def test_of_a_whole_answer(self, serve: Serve) -> None:
        server = serve(max_new_tokens=200)
        slow = server._engine._decoder.step
        server._engine._decoder.step = lambda: (time.sleep(0.02), slow())  # type: ignore[assignment, method-assign]
        connection = http.client.HTTPConnection(urlsplit(server.address).netloc, timeout=60)
        connection.request("POST", "/v1/chat/completions", json.dumps({"model": "tiny", "messages": ask("a")}))
        until(lambda: bool(batch(server)))
        (answer,) = batch(server)
        connection.close()
        until(lambda: not batch(server))
        assert answer.computed < 200

    def test_of_one_who_waits(self, serve: Serve, client: Client) -> None:
        server = serve(max_batch=1, max_new_tokens=200)
        with client(server).chat.completions.create(model="tiny", messages=ask("a"), stream=True) as stream:
            next(iter(stream))
            connection = http.client.HTTPConnection(urlsplit(server.address).netloc, timeout=60)
            connection.request("POST", "/v1/chat/completions", json.dumps({"model": "tiny", "messages": ask("b")}))
            until(lambda: len(server._engine._waiting) == 1)
            connection.close()
        found = client(server).chat.completions.create(model="tiny", messages=ask("c"), max_tokens=2)
        assert found.usage.completion_tokens == 2


class TestWorkers:
    def test_a_failure_is_told_and_passes(
        self, serve: Serve, client: Client, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server = serve()
        session = ciphertune.session_of(server._engine._decoder._model)
        create = client(server).chat.completions.create
        expected = create(model="tiny", messages=ask("Hello"), max_tokens=6).choices
        product, count = session.product, iter(range(1000))

        def lost(*arguments: Any, **known: Any) -> Any:
            if next(count) == 40:
                raise TransportError("worker 1 is gone")
            return product(*arguments, **known)

        monkeypatch.setattr(session, "product", lost)
        with pytest.raises(openai.InternalServerError) as caught:
            create(model="tiny", messages=ask("Hello"), max_tokens=6)
        assert caught.value.status_code == 503
        assert "worker 1 is gone" in caplog.text
        assert create(model="tiny", messages=ask("Hello"), max_tokens=6).choices == expected
        count = iter(range(20, 1000))
        with pytest.raises(openai.APIError, match="do not answer"):
            list(create(model="tiny", messages=ask("Hello"), max_tokens=6, stream=True))

    def test_what_was_asked_is_in_no_log(
        self, serve: Serve, client: Client, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
    ) -> None:
        caplog.set_level(logging.DEBUG)
        server = serve()
        create = client(server).chat.completions.create
        create(model="tiny", messages=ask(SECRET), max_tokens=2)

        def leaks(*_: Any) -> None:
            raise RuntimeError(f"prompt: {SECRET}")

        decoder: Any = server._engine._decoder
        join, decoder.join = decoder.join, leaks
        with pytest.raises(openai.InternalServerError) as caught:
            create(model="tiny", messages=ask(SECRET), max_tokens=2)
        decoder.join = join
        server._engine.submit = leaks  # type: ignore[assignment, method-assign]
        with pytest.raises(openai.InternalServerError) as other:
            create(model="tiny", messages=ask(SECRET), max_tokens=2)
        own = [record for record in caplog.records if record.name.startswith(("ciphertune", "uvicorn", "starlette"))]
        assert any("RuntimeError" in record.getMessage() for record in own)
        printed = capfd.readouterr()
        shown = [str(caught.value), str(other.value), printed.out, printed.err, *(r.getMessage() for r in own)]
        assert SECRET not in "\n".join(shown)
        assert not any(record.exc_info for record in own)


class TestLengths:
    def test_every_answer_takes_a_fixed_number_of_steps(
        self, serve: Serve, client: Client, script: Callable[[str], None]
    ) -> None:
        server = serve(max_new_tokens=10, fixed_length=True, pad_tokens=64)
        session = ciphertune.session_of(server._engine._decoder._model)
        create = client(server).chat.completions.create
        costs = set()
        for text, asked in (("a", "short"), ("abcdefg", "a longer one")):
            script(text)
            before = session.traffic.requests, session.traffic.bytes_up
            found = create(model="tiny", messages=ask(asked)).choices[0]
            assert found.message.content == text
            until(lambda: not batch(server))
            costs.add((session.traffic.requests - before[0], session.traffic.bytes_up - before[1]))
        assert len(costs) == 1
        with pytest.raises(openai.BadRequestError, match="at most 10"):
            create(model="tiny", messages=ask("a"), max_tokens=11)
        with pytest.raises(openai.BadRequestError, match="256 positions"):
            create(model="tiny", messages=ask("a" * 235), max_tokens=2)


def test_the_page_needs_nothing_from_elsewhere(serve: Serve) -> None:
    server = serve(api_keys=KEYS)
    status, headers, content = raw(server, "GET", "/")
    assert status == 200
    assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
    assert b"http" not in content.replace(b"http-equiv", b"")
    for path in ("/page.js", "/page.css"):
        assert raw(server, "GET", path)[0] == 200


class TestSettings:
    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
    def test_others_need_a_key(self, host: str) -> None:
        with pytest.raises(SecurityError, match="give each caller an API key"):
            ServeSettings(host=host)
        assert not ServeSettings(host=host, api_keys=KEYS).loopback

    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
    def test_this_machine_needs_none(self, host: str) -> None:
        assert ServeSettings(host=host).loopback

    @pytest.mark.parametrize(
        "changes",
        [{"api_keys": ("short",)}, {"api_keys": (KEYS[0], KEYS[0])}, {"api_keys": ("with a blank in it",)},
         {"max_batch": 0}, {"port": 70000}, {"certificate": "x"},
         {"pad_tokens": 0}],
    )  # fmt: skip
    def test_what_cannot_be(self, changes: dict[str, Any]) -> None:
        with pytest.raises(ConfigError) as caught:
            ServeSettings(**changes)
        assert "short" not in str(caught.value)

    def test_keys_are_not_shown(self) -> None:
        assert KEYS[0] not in repr(ServeSettings(api_keys=KEYS))

    def test_an_address_in_use(self, serve: Serve, letters: Callable[..., Any], tokenizer: Any) -> None:
        port = urlsplit(serve().address).port
        with pytest.raises(TransportError, match="cannot listen"):
            Server("tiny", letters(), tokenizer, ServeSettings(port=port or 0))

    def test_files_that_are_no_certificate(self, serve: Serve, tmp_path: Any) -> None:
        (tmp_path / "x.pem").write_text("none")
        with pytest.raises(ConfigError, match=r"x\.pem"):
            serve(None, certificate=tmp_path / "x.pem", certificate_key=tmp_path / "x.pem")

    def test_a_tokenizer_of_another_model(self, letters: Callable[..., Any], tokenizer: Any) -> None:
        with pytest.raises(ConfigError, match="do not belong together"):
            Server("tiny", letters(vocab_size=50, eos_token_id=1), tokenizer, ServeSettings(port=0))
        with pytest.raises(ConfigError, match="no tokenizer"):
            Server("tiny", letters(), None, ServeSettings(port=0))
