"""The caller's torch modes kept out of what CipherTune computes and keeps."""

from __future__ import annotations

import contextlib
from types import TracebackType

import torch
from torch.utils import _python_dispatch

from ciphertune._support.torch_compat import autocast_dtype, without_autocast


class own_modes(contextlib.ContextDecorator):  # noqa: N801 - read as a possessive
    """Compute without gradients and without any mode of the caller's; also a decorator.

    Left out are inference mode, autocast, and function and dispatch modes, a default device among them. Tensors made
    here may outlive the call: keys, scratch memory, prepared weights. One made in inference mode could never be
    written again outside of it.

    The default dtype is the whole process's, so it is left alone: whatever is made here states its dtype.
    """

    def _recreate_cm(self) -> own_modes:
        return own_modes()

    def __enter__(self) -> None:
        # Entered for every product, so that modes which are as they should be cost nothing.
        modes: list[contextlib.AbstractContextManager[object]] = []
        if torch._C._is_any_autocast_enabled():
            modes += [without_autocast(kind) for kind in ("cpu", "cuda") if autocast_dtype(kind) is not None]
        if _python_dispatch._get_current_dispatch_mode_stack():
            modes.append(_python_dispatch._disable_current_modes())
        if torch.is_inference_mode_enabled():
            modes.append(torch.inference_mode(False))
        self._stack = None
        if modes:
            self._stack = contextlib.ExitStack()
            for mode in modes:
                self._stack.enter_context(mode)
        self._gradients = torch.is_grad_enabled()
        if self._gradients:
            torch._C._set_grad_enabled(False)
        self._functions = torch._C.DisableTorchFunction()
        self._functions.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._functions.__exit__(kind, error, at)
        if self._gradients:
            torch._C._set_grad_enabled(True)
        if self._stack is not None:
            self._stack.__exit__(kind, error, at)
