"""Directories and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

DRAFT_PREFIX = ".draft-"
"""Prefix of the name of a file or directory that is being written or removed."""


@contextlib.contextmanager
def atomic_directory(final: Path, mode: int = 0o777) -> Iterator[Path]:
    """Make an empty directory beside ``final``, renamed to it on success and removed on any exception.

    Args:
        final: must not exist yet. Missing parents are made.
        mode: permissions of the directory, less the process's umask.

    Raises:
        OSError: it cannot be written, or ``final`` exists and is not empty.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    with draft_directory(final, mode) as draft:
        yield draft
        sync_tree(draft)
        draft.replace(final)
        _sync(final.parent)


@contextlib.contextmanager
def draft_directory(beside: Path, mode: int = 0o777) -> Iterator[Path]:
    """Make an empty directory in the parent of ``beside``, removed at the end if it is still there."""
    draft = _draft_beside(beside)
    try:
        draft.mkdir(mode=mode)
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def libraries_write() -> Iterator[None]:
    """Raise ``OSError`` where safetensors or tokenizers cannot write, which they tell by errors of their own."""
    import safetensors

    try:
        yield
    except safetensors.SafetensorError as error:
        raise OSError(f"tensors cannot be written: {error}") from error
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(f"a tokenizer cannot be written: {error}") from error


def replace_file(path: Path, content: bytes) -> None:
    """Write a file of mode 0600 that appears whole or keeps its old content. Raises ``OSError``."""
    draft = _draft_beside(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        with os.fdopen(os.open(draft, flags, 0o600), "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def put_directory(made: Path, target: Path) -> None:
    """Rename a directory to ``target``, in place of what is there, which stays if that fails. Raises ``OSError``."""
    with draft_directory(target) as before:
        there = target.exists()
        if there:
            target.replace(before)
        try:
            made.replace(target)
        except BaseException:
            if there:
                before.replace(target)
            raise


def sync_tree(directory: Path) -> None:
    """Flush a directory and everything below it to the disk."""
    for path in directory.rglob("*"):
        _sync(path)
    _sync(directory)


def remove_directory(path: Path) -> None:
    """Remove a directory such that an interruption never leaves half of it under its name."""
    draft = _draft_beside(path)
    path.replace(draft)
    shutil.rmtree(draft)


def remove_drafts(directory: Path) -> None:
    """Remove the drafts that a killed process left in a directory."""
    for path in directory.glob(DRAFT_PREFIX + "*"):
        shutil.rmtree(path, ignore_errors=True)


def _draft_beside(path: Path) -> Path:
    return path.parent / f"{DRAFT_PREFIX}{path.name}-{secrets.token_hex(4)}"


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows cannot open directories
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
