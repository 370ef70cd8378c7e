"""Workers that gave wrong answers, remembered between runs: a file of mode 0600 each, in the folder of keys."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import logging
from pathlib import Path

from ciphertune.errors import KeyFileError
from ciphertune.key_files import keys_folder, make_keys_folder, read_key_file, write_key_file

log = logging.getLogger(__name__)

_FORM = "ciphertune-excluded-1"
_FOLDER = "excluded"
_LONGEST = 800


@dataclasses.dataclass(frozen=True)
class Exclusion:
    """A worker that gave a wrong answer.

    Attributes:
        worker: its address.
        why: what it answered wrongly.
        when: UTC, in ISO 8601.
        identity: what its connection proves it to be, as ``Link.identity``; empty where nothing does.
        model: digest of the client's model, hexadecimal. Without an identity, the worker is known by model and address.
    """

    worker: str
    why: str
    when: str
    identity: str = ""
    model: str = ""

    @classmethod
    def now(cls, worker: str, identity: str, model: str, why: str) -> Exclusion:
        """The exclusion of a worker at this moment."""
        when = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        return cls(worker[:_LONGEST], why[:_LONGEST], when, identity, "" if identity else model)

    @property
    def name(self) -> str:
        """What ``ciphertune excluded --lift`` calls it: the name of its file."""
        known = self.identity or f"{self.model} {self.worker}"
        return hashlib.sha256(known.encode()).hexdigest()[:12]

    @property
    def text(self) -> str:
        """One sentence: when, why, and what takes it back."""
        day, _, clock = self.when.partition("T")
        return (
            f"it is excluded since {day} {clock[:5]} UTC, when {self.why}; "
            f"'ciphertune excluded --lift {self.name}' takes it back"
        )


class Exclusions:
    """The exclusions of this user, in the folder of keys.

    Args:
        folder: of the key files; ``keys_folder`` decides if not given.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = (keys_folder(None) if folder is None else folder) / _FOLDER

    def all(self) -> list[Exclusion]:
        """Every exclusion, the oldest first. Raises ``KeyFileError`` for a damaged file, which its message names."""
        return sorted(map(_read, self._folder.glob("*.json")), key=lambda each: each.when)

    def of(self, worker: str, identity: str, model: str | None) -> Exclusion | None:
        """The exclusion of a worker that is met.

        Args:
            worker: its address.
            identity: what its connection proves it to be; empty where nothing does.
            model: digest of the client's model; None for any.

        Raises:
            KeyFileError: a file is damaged.
        """
        for each in self.all():
            if each.identity:
                if each.identity == identity:
                    return each
            elif each.worker == worker and not identity and model in (None, each.model):
                return each
        return None

    def keep(self, exclusion: Exclusion) -> None:
        """Remember an exclusion. Where that cannot be done, a warning says so."""
        file = self._folder / f"{exclusion.name}.json"
        try:
            make_keys_folder(self._folder.parent)
            make_keys_folder(self._folder)
            if not file.exists():
                write_key_file(file, {"format": _FORM, **dataclasses.asdict(exclusion)})
        except KeyFileError as error:
            log.warning("the exclusion of %s ends with this session: %s", exclusion.worker, error)

    def lift(self, name: str) -> list[Exclusion]:
        """Take back the exclusions of this name or address; those that there were. Raises ``KeyFileError``."""
        lifted = [each for each in self.all() if name in (each.name, each.worker)]
        for each in lifted:
            (self._folder / f"{each.name}.json").unlink(missing_ok=True)
        return lifted


def _read(file: Path) -> Exclusion:
    content = read_key_file(file, _FORM)
    fields = {field.name: content.get(field.name) for field in dataclasses.fields(Exclusion)}
    if not all(isinstance(value, str) for value in fields.values()):
        raise KeyFileError(f"{file} is damaged: remove it to forget the exclusion that it stands for")
    found = Exclusion(**fields)  # type: ignore[arg-type]
    if file.stem != found.name:
        raise KeyFileError(f"{file} is damaged: it stands for another worker than it says. Remove it to forget it")
    return found
