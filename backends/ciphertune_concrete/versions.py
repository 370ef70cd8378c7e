"""Versions of Zama's packages: which a backend was made for, and whether that is the one here."""

from __future__ import annotations

import importlib.metadata


def installed(package: str) -> str | None:
    """The installed version of a package, None where there is none; nothing is imported."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def problem(backend: str, package: str, series: str, install: str) -> str | None:
    """Why a backend cannot run here: its package is missing, or of another series; None where it can.

    Args:
        backend: its name.
        package: name of the distribution.
        series: first numbers of its version, as ``0.2``.
        install: how to get it.
    """
    found = installed(package)
    if found is None:
        return f"the {backend} backend needs {package} {series}, which is not installed here: {install}"
    if found != series and not found.startswith(f"{series}."):
        return (
            f"the {backend} backend was made for {package} {series}, and {found} is installed here: {install}. "
            "Zama's packages pin each other, so this one may need an environment of its own"
        )
    return None
