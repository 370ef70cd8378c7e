"""Key files and the folder they are kept in.

A file with a secret has mode 0600, is written whole or not at all, and is refused if others can read it.
"""

from __future__ import annotations

import ctypes
import json
import os
import stat
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ciphertune.errors import KeyFileError

_LARGEST = 4096
_PR_SET_DUMPABLE = 4


def keys_folder(option: str | None) -> Path:
    """The folder of key files: what an option names, else ``CIPHERTUNE_KEYS``, else ``~/.ciphertune/keys``."""
    return Path(option or os.environ.get("CIPHERTUNE_KEYS") or "~/.ciphertune/keys").expanduser()


def make_keys_folder(folder: Path) -> None:
    """Make a folder for key files, of mode 0700, unless it exists. Folders above it are made too, as usual.

    Raises:
        KeyFileError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise KeyFileError(f"cannot make the folder {folder} for keys: {error.strerror}") from None


def read_key_file(path: str | os.PathLike[str], form: str, *, secret: bool = True) -> dict[str, Any]:
    """The content of a key file.

    Args:
        path: the file.
        form: what its ``format`` entry must be.
        secret: whether it must be unreadable for others.

    Raises:
        KeyFileError: missing, readable by others, damaged, or of another format. No content is quoted.
    """
    file = Path(path)
    try:
        status = file.stat()
        text = file.read_text(encoding="ascii") if status.st_size < _LARGEST else ""
    except OSError as error:
        raise KeyFileError(f"cannot read the key file {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        text = ""
    if secret:
        refuse_shared(file, status)
    try:
        content = json.loads(text)
        found = content["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise KeyFileError(f"{file} is damaged or not a key file") from None
    if found != form:
        raise KeyFileError(f"{file} has format {found!r}, expected {form!r}")
    return dict(content)


def refuse_shared(file: Path, status: os.stat_result) -> None:
    """Raise ``KeyFileError`` for a file that others can read."""
    mode = stat.S_IMODE(status.st_mode)
    if os.name == "posix" and mode & 0o077:
        raise KeyFileError(f"the key file {file} can be read by others (mode {mode:04o}): run chmod 600 {file}")


def write_key_file(path: str | os.PathLike[str], content: Mapping[str, Any], *, secret: bool = True) -> None:
    """Write a key file with mode 0600, or 0644 for a public one; an existing file is never overwritten.

    Raises:
        KeyFileError: the file exists or cannot be written; nothing half-written remains.
    """
    write_parts(path, [json.dumps(content).encode("ascii")], secret=secret)


def write_parts(path: str | os.PathLike[str], parts: Iterable[bytes | memoryview], *, secret: bool = True) -> None:
    """Write a file of any content as ``write_key_file`` does, for keys too large for JSON."""
    file = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.name, suffix=".tmp")
    except OSError as error:
        raise KeyFileError(f"cannot write a key file in {file.parent}: {error.strerror}") from None
    try:
        with os.fdopen(handle, "wb") as stream:
            for part in parts:
                stream.write(part)
            stream.flush()
            os.fsync(stream.fileno())
        if not secret:
            Path(temporary).chmod(0o644)
        os.link(temporary, file)
    except FileExistsError:
        raise KeyFileError(f"{file} exists already; a key file is never overwritten") from None
    except OSError as error:
        raise KeyFileError(f"cannot write the key file {file}: {error.strerror}") from None
    finally:
        Path(temporary).unlink()


def hide_process() -> bool:
    """Keep other processes of the same user from reading this one's memory, and core dumps from holding it (Linux).

    ``prctl(PR_SET_DUMPABLE, 0)``: debuggers cannot attach, and files such as ``/proc/PID/mem`` belong to root, who can
    still read them. Programs that are started from here are as readable as ever. ``CIPHERTUNE_DUMPABLE=1`` prevents it.

    Returns:
        Whether the process is hidden now.
    """
    if not sys.platform.startswith("linux") or os.environ.get("CIPHERTUNE_DUMPABLE") == "1":
        return False
    try:
        prctl = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        return False
    return bool(prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) == 0)
