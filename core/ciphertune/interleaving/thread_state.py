"""The state that torch keeps for each thread, carried over to another thread."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import overrides
from torch.utils import _python_dispatch

from ciphertune._support.torch_compat import autocast_dtype
from ciphertune._support.torch_rng import cuda_in_use


@dataclasses.dataclass(frozen=True)
class ThreadState:
    """Grad and inference mode, autocast, the mode stacks, the CUDA stream and the number of threads of one thread.

    Saved-tensor hooks are not included: torch has no function that lists them.
    """

    grad: bool
    inference: bool
    autocast: dict[str, torch.dtype]
    autocast_cache: bool
    function_modes: list[Any]
    dispatch_modes: list[Any]
    stream: Any
    threads: int

    @staticmethod
    def here() -> ThreadState:
        """The state of the calling thread."""
        dtypes = {kind: autocast_dtype(kind) for kind in ("cpu", "cuda")}
        return ThreadState(
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            {kind: dtype for kind, dtype in dtypes.items() if dtype is not None},
            torch.is_autocast_cache_enabled(),
            overrides._get_current_function_mode_stack(),  # type: ignore[no-untyped-call]
            _python_dispatch._get_current_dispatch_mode_stack(),
            torch.cuda.current_stream() if cuda_in_use() else None,
            torch.get_num_threads(),
        )

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Set this state on the calling thread within a ``with`` block."""
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        with contextlib.ExitStack() as stack:
            if self.stream is not None:
                stack.enter_context(torch.cuda.stream(self.stream))
            # Pushed rather than entered: a mode that is entered twice forgets what was before it.
            for mode in self.function_modes:
                overrides._push_mode(mode)  # type: ignore[no-untyped-call]
                stack.callback(overrides._pop_mode)
            for mode in self.dispatch_modes:
                _python_dispatch._push_mode(mode)
                stack.callback(_python_dispatch._pop_mode)
            for kind, dtype in self.autocast.items():
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=self.autocast_cache))
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            yield
