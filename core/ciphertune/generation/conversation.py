"""A conversation with a model, line by line: messages, and words that set, save and end it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ciphertune._support.suggestions import closest
from ciphertune.data.examples import Message
from ciphertune.errors import CipherTuneError, ConfigError
from ciphertune.generation.answering import answer
from ciphertune.generation.keeping import KeptCache
from ciphertune.generation.opening import OpenedModel
from ciphertune.generation.prompts import Prompt, encode, refuse_no_template
from ciphertune.generation.settings import GenerationSettings

EXAMPLES = {
    "count": "Count from one to ten, and leave out every number that ends with an e.",
    "code": "Write a Python function that says whether a text reads the same backwards.",
    "explain": "Explain in three sentences what an encrypted message is.",
}
"""Messages by the name that ``!example`` takes."""
HELP = """\
/help, !help             this text
/reset, !clear           forget the conversation
/save FILE, !save FILE   write the conversation to a file that others cannot read (JSON lines, as 'train' reads them)
/status, !status         model, settings, and what was sent
/set NAME=VALUE …        settings by the names of transformers, and system=TEXT; also !set
/example NAME            send an example; also !example
/exit, !exit             end; so does Ctrl-D
Ctrl-C stops an answer."""
_WORDS = {"clear": "reset"}
"""Words of ``transformers chat`` that have another name here."""


class Conversation:
    """What was said, and what is to be done with a line.

    Args:
        opened: the model, whose tokenizer has a chat template.
        settings: how answers are generated.
        write: called with each piece of text to show.
        system: the system prompt, if any.
        draft: as for ``answer``.

    Attributes:
        turns: the conversation.

    Raises:
        ConfigError: there is no chat template.
    """

    def __init__(
        self,
        opened: OpenedModel,
        settings: GenerationSettings,
        write: Callable[[str], None],
        system: str | None = None,
        draft: Any = None,
    ) -> None:
        refuse_no_template(opened)
        self.opened = opened
        self.settings = settings
        self.system = system
        self.turns: list[Message] = []
        self._write = write
        self._draft = draft
        self._kept = KeptCache(opened.model)
        self._saved: set[Path] = set()
        self._reset("")

    def take(self, line: str) -> bool:
        """Do what a line asks, and return whether the conversation goes on. What goes wrong is written."""
        text = line.strip()
        if not text:
            return True
        word, _, rest = text[1:].partition(" ")
        try:
            if text[0] not in "/!":
                self._say(text)
            elif (name := _WORDS.get(word, word)) == "exit":
                return False
            else:
                self._command(name, rest.strip(), text[0])
        except CipherTuneError as error:
            self._write(f"{error}\n")
        return True

    def _command(self, name: str, rest: str, sign: str) -> None:
        commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: self._write(f"{HELP}\n"),
            "reset": self._reset,
            "save": self._save,
            "status": self._status,
            "set": self._set,
            "example": self._example,
        }
        if name not in commands:
            raise ConfigError(f"there is no {sign}{name}; {closest(name, [*commands, 'exit'])}")
        commands[name](rest)

    def _say(self, text: str) -> None:
        before = list(self.turns)
        self.turns.append({"role": "user", "content": text})
        try:
            ids = encode(self.opened, Prompt("the conversation", self.turns))
            with stoppable() as stop:
                streamed = not self.settings.beams
                answers, _ = answer(
                    self.opened,
                    [ids],
                    self.settings,
                    draft=self._draft,
                    on_text=self._write if streamed else None,
                    stop=stop,
                    kept=self._kept,
                )
        except CipherTuneError:
            self.turns = before
            raise
        if not streamed:
            self._write(answers[0].text)
        self.turns.append({"role": "assistant", "content": answers[0].text})
        self._write("\n" if answers[0].finish == "stop" else f" … ({answers[0].finish})\n")

    def _reset(self, rest: str) -> None:
        self._kept.drop()
        self.turns = [] if self.system is None else [{"role": "system", "content": self.system}]

    def _save(self, rest: str) -> None:
        path = Path(rest or f"chat_{time.strftime('%Y-%m-%d_%H-%M-%S')}.jsonl").expanduser()
        line = json.dumps({"messages": self.turns}, ensure_ascii=False) + "\n"
        # What this conversation wrote it may write again; nothing else is lost.
        new = os.O_TRUNC if path.absolute() in self._saved else os.O_EXCL
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | new, 0o600), "w", encoding="utf-8") as file:
                file.write(line)
        except FileExistsError:
            raise ConfigError(f"{path} exists already: choose another name") from None
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error
        self._saved.add(path.absolute())
        self._write(f"Saved to {path}\n")

    def _status(self, rest: str) -> None:
        traffic = self.opened.session.traffic
        set_values = {name: value for name, value in dataclasses.asdict(self.settings).items() if value is not None}
        self._write(
            f"model: {self.opened.source.name}\nadapter: {self.opened.source.adapter or 'none'}\n"
            f"workers: {self.opened.source.to}\nmessages: {len(self.turns)}\n"
            + "".join(f"{name}: {value}\n" for name, value in set_values.items())
            + f"sent: {traffic.bytes_up / 1e6:.1f} MB up, {traffic.bytes_down / 1e6:.1f} MB down\n"
        )

    def _set(self, rest: str) -> None:
        known = {field.name for field in dataclasses.fields(GenerationSettings)}
        if rest.startswith("system="):
            self.system = rest.removeprefix("system=") or None
            self._reset("")
            return
        values: dict[str, Any] = {}
        for pair in rest.split():
            name, equals, value = pair.partition("=")
            if not equals:
                raise ConfigError(f"{name!r} has no value: NAME=VALUE is expected")
            if name not in known:
                raise ConfigError(f"there is no setting {name!r}; {closest(name, known)}")
            try:
                values[name] = json.loads(value.lower() if value in ("True", "False") else value)
            except (ValueError, RecursionError):
                values[name] = None if value == "None" else value
        self.settings = dataclasses.replace(self.settings, **values)

    def _example(self, rest: str) -> None:
        if rest not in EXAMPLES:
            raise ConfigError(f"there is no example {rest!r}; {closest(rest, EXAMPLES)}")
        self._write(f"{EXAMPLES[rest]}\n")
        self._say(EXAMPLES[rest])


@contextlib.contextmanager
def stoppable() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets within a ``with`` block; the second interrupts the program as ever.

    A product that is under way ends first, so that the session with the workers stays whole. In another thread than
    the main one, where signals cannot be taken, nothing sets it.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
