"""How a process ends that has used Zama's compiler."""

from __future__ import annotations

import atexit
import sys


def keep_status() -> None:
    """Leave the status that this process ends with to whoever ends it; to be called once the compiler is imported.

    When Python ends, the compiler stops a runtime for several machines, which nothing here starts. In a process that
    has compiled, that ends the process at once with status 0, whatever went wrong.
    """
    stop = getattr(sys.modules.get("concrete.compiler"), "_terminate_df_parallelization", None)
    if stop is not None:
        atexit.unregister(stop)
