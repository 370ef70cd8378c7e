"""The server's application: paths, keys, limits, and answers as one document or as a stream of events."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.resources
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ciphertune.serving.answers import Answer, End, Event, Failure
from ciphertune.serving.choosing import Chooser, LogProbabilities
from ciphertune.serving.engine import Engine
from ciphertune.serving.keys import Callers
from ciphertune.serving.replies import Reply, tool_calls, usage
from ciphertune.serving.request_error import RequestError, failed
from ciphertune.serving.requests import Asked, parse_chat, parse_completion, read_json
from ciphertune.serving.served import ServedModel
from ciphertune.serving.settings import ServeSettings
from ciphertune.serving.text import Detokenizer

log = logging.getLogger("ciphertune.serve")

_BODY_SECONDS = 60.0
"""Longest time that a request's body may take."""

_PAGE = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclasses.dataclass(frozen=True)
class _Prompts:
    """The prompts of one request.

    Attributes:
        asked: what it asks for.
        kind: of its documents.
        caller: whose it is.
        tokens: of each prompt.
        tools: that its answers may call.
        param: the field that prompts are in.
    """

    asked: Asked
    kind: str
    caller: str
    tokens: Sequence[list[int]] = dataclasses.field(repr=False)
    tools: list[dict[str, Any]] = dataclasses.field(repr=False)
    param: str


class Application:
    """Answers requests of the protocol.

    Args:
        served: the model.
        engine: computes answers.
        callers: names callers.
        settings: limits.
    """

    def __init__(self, served: ServedModel, engine: Engine, callers: Callers, settings: ServeSettings) -> None:
        self._served = served
        self._engine = engine
        self._callers = callers
        self._settings = settings

    def asgi(self) -> ASGIApp:
        """The application, for a server such as uvicorn."""
        routes = [
            Route("/health", self._guarded(self._health)),
            Route("/v1/models", self._guarded(self._models)),
            Route("/v1/models/{name:path}", self._guarded(self._model)),
            Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
            Route("/v1/completions", self._guarded(self._complete), methods=["POST"]),
            *(Route(path, _page(*place)) for path, place in _PAGE.items()),
        ]
        return _quiet(Starlette(routes=routes, exception_handlers={HTTPException: _http_error}))

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _models(self, request: Request) -> Response:
        self._callers.of(request.headers)
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        self._callers.of(request.headers)
        self._refuse_other(request.path_params["name"])
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        return {"id": self._served.name, "object": "model", "created": 0, "owned_by": "ciphertune"}

    async def _chat(self, request: Request) -> Response:
        caller = self._callers.of(request.headers)
        chat = parse_chat(read_json(await self._body(request)))
        self._refuse_other(chat.asked.model)
        tokens = await run_in_threadpool(self._served.chat_tokens, chat)
        return await self._answer(
            request, _Prompts(chat.asked, "chat.completion", caller, [tokens], chat.tools, "messages")
        )

    async def _complete(self, request: Request) -> Response:
        caller = self._callers.of(request.headers)
        completion = parse_completion(read_json(await self._body(request)))
        self._refuse_other(completion.asked.model)
        tokens = [await run_in_threadpool(self._served.tokens, prompt) for prompt in completion.prompts]
        return await self._answer(request, _Prompts(completion.asked, "text_completion", caller, tokens, [], "prompt"))

    def _refuse_other(self, name: str) -> None:
        if name != self._served.name:
            raise RequestError(f"this server has one model, {self._served.name!r}", 404, "model_not_found", "model")

    async def _body(self, request: Request) -> bytes:
        """The body, read no further than it may be long."""
        most = self._settings.max_body
        length = request.headers.get("content-length", "")
        if length.isdigit() and (len(length) > 18 or int(length) > most):
            raise _too_long(most)
        body = bytearray()

        async def read() -> None:
            async for part in request.stream():
                body.extend(part)
                if len(body) > most:
                    raise _too_long(most)

        try:
            await asyncio.wait_for(read(), _BODY_SECONDS)
        except asyncio.TimeoutError:
            raise RequestError("the body did not come in time", 408, "timeout") from None
        return bytes(body)

    async def _answer(self, request: Request, prompts: _Prompts) -> Response:
        events: asyncio.Queue[Event] = asyncio.Queue()
        answers = self._answers(prompts, events, asyncio.get_running_loop())
        self._engine.submit(answers)
        under_way = _UnderWay(request, answers, events)
        reply = Reply(prompts.kind, prompts.asked.model, self._served.tokenizer)
        if prompts.asked.stream:
            # What goes wrong before the first token still has a status of its own.
            first = await under_way.next()
            if isinstance(first, Failure):
                under_way.cancel()
                raise first.refusal
            return StreamingResponse(
                self._stream(prompts, under_way, reply, first),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
            )
        return JSONResponse(await self._whole(prompts, under_way, reply))

    def _answers(
        self, prompts: _Prompts, events: asyncio.Queue[Event], loop: asyncio.AbstractEventLoop
    ) -> list[Answer]:
        def send(event: Event) -> None:
            # The loop may have ended.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(events.put_nowait, event)

        served, settings, asked = self._served, self._settings, prompts.asked
        found: list[Answer] = []
        for tokens in prompts.tokens:
            most = settings.max_new_tokens
            fixed = most if settings.fixed_length else None
            limit = served.room(len(tokens), most, asked.max_tokens, prompts.param)
            served.room(len(tokens), most, fixed, prompts.param)
            for choice in range(asked.choices):
                sampling = asked.sampling
                if sampling.seed is not None:
                    sampling = dataclasses.replace(sampling, seed=sampling.seed + choice)
                found.append(
                    Answer(
                        index=len(found),
                        caller=prompts.caller,
                        prompt=tokens,
                        limit=limit,
                        chooser=Chooser(sampling, served.defaults, tokens),
                        ends=served.ends,
                        stops=asked.stops,
                        text=Detokenizer(served.tokenizer, special=bool(prompts.tools)),
                        send=send,
                        fixed_length=fixed,
                    )
                )
        return found

    async def _whole(self, prompts: _Prompts, under_way: _UnderWay, reply: Reply) -> dict[str, Any]:
        texts = {answer.index: "" for answer in under_way.answers}
        likely: dict[int, list[LogProbabilities]] = {index: [] for index in texts}
        ends: dict[int, End] = {}
        try:
            while len(ends) < len(texts):
                event = await under_way.next()
                if isinstance(event, Failure):
                    raise event.refusal
                if isinstance(event, End):
                    ends[event.index] = event
                else:
                    texts[event.index] += event.text
                    likely[event.index] += event.likely
        finally:
            under_way.cancel()
        choices = []
        told = prompts.asked.sampling.top_logprobs is not None
        for index, text in texts.items():
            message, reason = self._message(prompts, text, ends[index])
            choices.append(reply.choice(index, message, likely[index] if told else None, reason))
        return reply.whole(choices, _usage(prompts, ends))

    async def _stream(self, prompts: _Prompts, under_way: _UnderWay, reply: Reply, first: Event) -> AsyncIterator[str]:
        """Events as they come; with tools an answer comes at its end, since it must be read as a whole."""
        held = {answer.index: "" for answer in under_way.answers}
        ends: dict[int, End] = {}
        told = prompts.asked.sampling.top_logprobs is not None
        event: Event | None = first
        try:
            if reply.chat:
                for index in held:
                    yield _event(reply.chunk(index, {"role": "assistant", "content": ""}))
            while len(ends) < len(held):
                event = event or await under_way.next()
                if isinstance(event, Failure):
                    yield _event(event.refusal.body())
                    return
                if isinstance(event, End):
                    ends[event.index] = event
                    message, reason = self._message(prompts, held[event.index], event)
                    if prompts.tools:
                        calls = [{"index": i, **each} for i, each in enumerate(message.pop("tool_calls", []))]
                        delta = {**message, **({"tool_calls": calls} if calls else {})}
                        yield _event(reply.chunk(event.index, delta))
                    yield _event(reply.chunk(event.index, {}, reason=reason))
                elif prompts.tools:
                    held[event.index] += event.text
                else:
                    yield _event(reply.chunk(event.index, {"content": event.text}, event.likely if told else None))
                event = None
            if prompts.asked.usage:
                yield _event(reply.counts(_usage(prompts, ends)))
            yield "data: [DONE]\n\n"
        except ClientDisconnect:
            return
        finally:
            under_way.cancel()

    def _message(self, prompts: _Prompts, text: str, end: End) -> tuple[dict[str, Any], str]:
        """The answer's message, and why it ended."""
        if not prompts.tools:
            return {"content": text}, end.reason
        try:
            parsed = self._served.read_calls(text, prompts.tokens[0], prompts.tools)
            calls = tool_calls(parsed.get("tool_calls") or [])
        except Exception:
            # What the model wrote is no call that can be read: it is text.
            log.info("an answer with tools could not be read as calls")
            return {"content": text}, end.reason
        if not calls:
            return {"content": parsed.get("content") or ""}, end.reason
        return {"content": parsed.get("content"), "tool_calls": calls}, "tool_calls"

    @staticmethod
    def _guarded(handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            try:
                return await handler(request)
            except RequestError as refusal:
                return _refused(refusal)
            except ClientDisconnect:
                return Response(status_code=499)
            except Exception as error:
                kind = type(error).__name__
            # Its text may hold what was asked, and could end up in a log that is written while it is handled.
            log.error("a request failed: %s", kind)
            return _refused(failed())

        return guarded


class _UnderWay:
    """The answers of one request, and their events until the client is gone.

    Args:
        request: whose body was read.
        answers: under way.
        events: of them.
    """

    def __init__(self, request: Request, answers: list[Answer], events: asyncio.Queue[Event]) -> None:
        self.answers = answers
        self._events = events
        self._gone = asyncio.ensure_future(_gone(request))

    async def next(self) -> Event:
        """The next event.

        Raises:
            ClientDisconnect: the client is gone. Its answers are given up.
        """
        event = asyncio.ensure_future(self._events.get())
        try:
            await asyncio.wait({event, self._gone}, return_when=asyncio.FIRST_COMPLETED)
            if event.done():
                return event.result()
        finally:
            event.cancel()
        self.cancel()
        raise ClientDisconnect

    def cancel(self) -> None:
        """Give up what is not complete."""
        for answer in self.answers:
            answer.give_up()
        self._gone.cancel()


async def _gone(request: Request) -> None:
    """Wait for the client to close the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _usage(prompts: _Prompts, ends: dict[int, End]) -> dict[str, int]:
    return usage(sum(map(len, prompts.tokens)), sum(end.tokens for end in ends.values()))


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document, separators=(',', ':'))}\n\n"


def _too_long(most: int) -> RequestError:
    return RequestError(f"the body is longer than {most} bytes", 413, "body_too_long")


def _refused(refusal: RequestError) -> Response:
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "5"}, 503: {"Retry-After": "5"}}
    response = JSONResponse(refusal.body(), refusal.status, headers=headers.get(refusal.status))
    if refusal.status in (401, 403, 408, 413):
        # The rest of a body that is not read.
        response.headers["Connection"] = "close"
    return response


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = {404: "there is nothing at this path", 405: "this path takes other methods"}
    return _refused(RequestError(what.get(error.status_code, "the request is refused"), error.status_code))


def _page(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    content = (importlib.resources.files("ciphertune.serving") / name).read_bytes()

    async def page(request: Request) -> Response:
        return Response(content, media_type=kind, headers=_PAGE_HEADERS)

    return page


def _quiet(app: ASGIApp) -> ASGIApp:
    """An application whose failures are named in the log and not described, as their texts may hold what was asked."""

    async def quiet(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
            return
        except Exception as error:
            kind = type(error).__name__
        log.error("a connection failed: %s", kind)

    return quiet
