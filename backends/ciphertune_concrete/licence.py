"""Notice of Zama's licence, given once a process when one of these backends is first used."""

from __future__ import annotations

import functools
import warnings

TERMS = "BSD-3-Clause-Clear, which grants no patent rights: commercial use needs a patent licence from Zama"
"""The licence in tables."""


class LicenceNotice(UserWarning):
    """A dependency's licence asks for more than installing it."""


@functools.cache
def notice(package: str) -> None:
    """Warn that a Zama package needs a patent licence for commercial use.

    Args:
        package: name of the distribution, as pip knows it.
    """
    warnings.warn(
        f"{package} is under the licence {TERMS}",
        LicenceNotice,
        stacklevel=3,
    )
