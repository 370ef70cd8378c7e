"""Checks of what a backend's client half returns, so that its faults are not taken for others'."""

from __future__ import annotations

import torch
from torch import Tensor

from ciphertune._support.finite import all_finite
from ciphertune.backend import Encrypted, LinearMap
from ciphertune.errors import ReplyError
from ciphertune.plugins import registry
from ciphertune.plugins.blame import wrong_result
from ciphertune.protocol import buffers_fault

_LARGEST_FLOAT32 = float(torch.finfo(torch.float32).max)


def check_requests(backend: str, found: object, count: int) -> None:
    """Refuse what ``encrypt_pieces`` or ``encrypt_owned`` gave unless it is a request for each piece.

    Raises:
        PluginError: it is something else.
    """
    if not isinstance(found, (list, tuple)) or len(found) != count:
        what = f"{len(found)} requests" if isinstance(found, (list, tuple)) else f"a {type(found).__name__}"
        raise wrong_result(registry.BACKENDS, backend, "encryption", f"gave {what} for {count} pieces")
    for each in found:
        if not isinstance(each, Encrypted):
            why = f"gave a {type(each).__name__}, and must give a ciphertune.backend.Encrypted"
            raise wrong_result(registry.BACKENDS, backend, "encryption", why)
        if fault := buffers_fault(each.buffers):
            raise wrong_result(registry.BACKENDS, backend, "the buffers of an encrypted request:", f"it {fault}")


def check_tensor(backend: str, found: object) -> None:
    """Refuse a decrypted product that is no float32 tensor.

    Raises:
        PluginError: it is something else.
    """
    if not isinstance(found, Tensor):
        why = f"gave a {type(found).__name__}, and must give a float32 tensor"
        raise wrong_result(registry.BACKENDS, backend, "decryption", why)
    if found.dtype != torch.float32:
        why = f"gave {str(found.dtype).removeprefix('torch.')}, and must give float32"
        raise wrong_result(registry.BACKENDS, backend, "decryption", why)


def check_product(backend: str, found: object, shape: tuple[int, int], x: Tensor, whole: LinearMap) -> None:
    """Refuse a whole product that is no float32 tensor of its shape, or not finite where its input is no reason.

    Args:
        backend: name of the backend.
        found: what ``put_together`` gave.
        shape: what it must have.
        x: finite input of the product.
        whole: its map.

    Raises:
        PluginError: it is something else, or not finite although no product of x is as large as float32 ends.
        ReplyError: it has another shape, as a reply of another shape may lead to.
    """
    check_tensor(backend, found)
    assert isinstance(found, Tensor)
    if found.shape != shape:
        raise ReplyError(f"{whole.label}: the reply decrypts to the wrong shape {tuple(found.shape)}")
    if found.numel() == 0 or all_finite(found):
        return
    largest = float(torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).max()) * whole.max_norm
    if largest < 0.5 * _LARGEST_FLOAT32:
        bad = int((~torch.isfinite(found)).sum())
        raise wrong_result(
            registry.BACKENDS,
            backend,
            "decryption",
            f"gave {bad} of {found.numel()} values that are NaN or infinite for {whole.label} ({whole.direction}), "
            "from an input that was finite. Neither the learning rate nor the batch is the cause; a worker "
            "can be, where its answers are not checked",
        )
