"""concrete-ml-extensions, imported when it is first used, and its panics made into errors of ours."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

from ciphertune.errors import CipherTuneError, PluginError
from ciphertune_concrete import licence, versions

PACKAGE = "concrete-ml-extensions"
SERIES = "0.2"
INSTALL = 'pip install "ciphertune[concrete-glwe]"'


def load(*, notice: bool = True) -> Any:
    """Import the library.

    Args:
        notice: whether to say what its licence asks for.

    Raises:
        PluginError: it is not installed, is none that this backend was made for, or cannot be imported on this machine.
    """
    if version() is not None and (wrong := problem()) is not None:
        raise PluginError(wrong)
    try:
        library = importlib.import_module("concrete_ml_extensions")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "concrete_ml_extensions"
        why = "is not installed" if missing else f"cannot be imported ({error})"
        raise PluginError(
            f"the concrete-glwe backend needs the package {PACKAGE}, which {why} on this machine: {INSTALL} "
            "(it exists for Python 3.10 to 3.12 on Linux with glibc 2.34 or later, x86-64, and on macOS)"
        ) from error
    if notice:
        licence.notice(PACKAGE)
    return library


def version() -> str | None:
    """The installed version, None where there is none."""
    return versions.installed(PACKAGE)


def problem() -> str | None:
    """Why the backend cannot run here by what is installed; None where it can."""
    return versions.problem("concrete-glwe", PACKAGE, SERIES, INSTALL)


def other_layout() -> PluginError:
    """The error for bytes from the library that are not laid out as this version of CipherTune knows."""
    return PluginError(
        f"{PACKAGE} {version()} lays out its ciphertexts or keys in a way that this version of CipherTune does not "
        f"know; it knows that of 0.2.0: {INSTALL}"
    )


@contextlib.contextmanager
def panics_are(error: type[CipherTuneError], text: str) -> Iterator[None]:
    """Raise ``error`` where the library panics: what pyo3 raises then derives from BaseException."""
    try:
        yield
    except BaseException as panic:
        if isinstance(panic, Exception) or type(panic).__name__ != "PanicException":
            raise
        # The panic's text may quote values.
        raise error(text) from None
