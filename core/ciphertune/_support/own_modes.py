"""The caller's torch modes kept out of what CipherTune computes and keeps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.utils import _python_dispatch

from ciphertune._support.torch_compat import autocast_dtype


@contextlib.contextmanager
def own_modes() -> Iterator[None]:
    """Compute without gradients and without any mode of the caller's; also a decorator.

    Left out are inference mode, autocast, and function and dispatch modes, a default device among them. Tensors made
    here may outlive the call: keys, scratch memory, prepared weights. One made in inference mode could never be
    written again outside of it.

    The default dtype is the whole process's, so it is left alone: whatever is made here states its dtype.
    """
    with contextlib.ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if autocast_dtype(kind) is not None:
                stack.enter_context(torch.autocast(kind, enabled=False))
        if _python_dispatch._get_current_dispatch_mode_stack():
            stack.enter_context(_python_dispatch._disable_current_modes())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch._C.DisableTorchFunction())
        yield
