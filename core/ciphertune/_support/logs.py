"""Forms of a log: lines for people, or one JSON object a line. Both show a record's ``fields``."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator, Sequence


def fields_of(record: logging.LogRecord) -> dict[str, object]:
    """What a record was given as ``extra={"fields": {…}}``."""
    fields = getattr(record, "fields", {})
    return dict(fields) if isinstance(fields, dict) else {}


class TextFormatter(logging.Formatter):
    """Lines for people: time, level, message, and fields as ``name value``."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """See ``logging.Formatter.format``."""
        first, end, rest = super().format(record).partition("\n")
        fields = ", ".join(f"{name} {value}" for name, value in fields_of(record).items())
        return first + (f": {fields}" if fields else "") + end + rest


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time`` (UTC), ``level``, ``logger``, ``message``, and the fields."""

    def format(self, record: logging.LogRecord) -> str:
        """See ``logging.Formatter.format``."""
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **fields_of(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


@contextlib.contextmanager
def log_to_stderr(form: str, level: str, names: Sequence[str] = ("",)) -> Iterator[None]:
    """Have loggers write to standard error alone, within the context.

    Args:
        form: ``text`` or ``json``.
        level: the least that is written.
        names: of the loggers; that of the root for what every package says.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    loggers = [logging.getLogger(name) for name in names]
    before = [(list(each.handlers), each.level) for each in loggers]
    for each in loggers:
        each.handlers[:] = [handler]
        each.setLevel(level.upper())
    try:
        yield
    finally:
        for each, (handlers, least) in zip(loggers, before, strict=True):
            each.handlers[:] = handlers
            each.setLevel(least)
