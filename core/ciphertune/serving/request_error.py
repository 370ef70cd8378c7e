"""Errors as the protocol writes them. None of them repeats what was asked or answered."""

from __future__ import annotations

from typing import Any


class RequestError(Exception):
    """An error for whoever sent the request.

    Args:
        message: for people.
        status: of HTTP.
        code: for programs.
        param: the field that is wrong, if one is.
    """

    def __init__(self, message: str, status: int = 400, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.param = param

    def body(self) -> dict[str, Any]:
        """The JSON document."""
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


_KINDS = {401: "authentication_error", 429: "rate_limit_error"}


def busy(waiting: int) -> RequestError:
    """Too many requests of one caller wait."""
    return RequestError(f"{waiting} requests of this key wait already: ask again later", 429, "rate_limit_exceeded")


def unavailable() -> RequestError:
    """The workers failed, or the server ends."""
    return RequestError(
        "the workers do not answer, or give wrong answers; the server's log says more. Ask again later",
        503,
        "workers_unavailable",
    )


def failed() -> RequestError:
    """Something unexpected."""
    return RequestError("the server failed; its log names the error", 500, "internal_error")
