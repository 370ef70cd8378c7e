"""Bounds on what a model takes while it is built from a configuration, whoever wrote that."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as registration
from torch.utils import _pytree as trees
from torch.utils._python_dispatch import TorchDispatchMode

from ciphertune.errors import ConfigError

ROOM = 1 << 30
"""Bytes of tensors that a model in the making has at most: buffers, and parameters before they are moved."""

MOST_MODULES = 1 << 17
"""Modules and parameters of a model: Python takes some kilobytes for each."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Bound what the models made here take on this thread.

    A tensor for which there is no room is made on the meta device. That is where parameters go anyway; a buffer that is
    found there in the end was too large.

    Raises:
        ConfigError: there are more than ``MOST_MODULES`` modules and parameters.
    """
    thread, count = threading.get_ident(), 0

    def register(*_: Any) -> None:
        nonlocal count
        if threading.get_ident() != thread:
            return
        count += 1
        if count > MOST_MODULES:
            raise ConfigError(f"the configuration describes a model of more than {MOST_MODULES} modules and parameters")

    with contextlib.ExitStack() as stack:
        for each in (
            registration.register_module_module_registration_hook,
            registration.register_module_parameter_registration_hook,
        ):
            stack.callback(each(register).remove)
        stack.enter_context(_Room(ROOM))
        yield


def refuse_meta_buffers(model: nn.Module) -> None:
    """Raise ``ConfigError`` for a model with a buffer for which there was no room."""
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise ConfigError(
                f"the configuration describes a buffer {name!r} of shape {tuple(buffer.shape)}, and the buffers of a "
                f"model may take {ROOM >> 20} MiB"
            )


class _Room(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes tensors on the meta device once those that are alive take all the room.

    Args:
        room: bytes.
    """

    def __init__(self, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._room, self._taken = room, 0
        self._alive: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func.is_view or func._schema.is_mutable:  # nothing is allocated
            return func(*args, **given)
        shapes = _on_meta(func, args, given)
        if shapes is not None and not self._has_room(_nbytes(shapes)):
            return shapes
        made = func(*args, **given)
        for tensor in _tensors(made):
            if tensor.device.type != "meta" and tensor.layout is torch.strided:
                storage = tensor.untyped_storage()
                self._alive.append((StorageWeakRef(storage), storage.nbytes()))  # type: ignore[no-untyped-call]
                self._taken += storage.nbytes()
        return made

    def _has_room(self, nbytes: int) -> bool:
        if self._taken + nbytes > self._room:
            alive = [not storage.expired() for storage, _ in self._alive]  # type: ignore[no-untyped-call]
            self._alive = list(itertools.compress(self._alive, alive))
            self._taken = sum(size for _, size in self._alive)
        return self._taken + nbytes <= self._room


def _on_meta(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a function gives, without numbers; None where that depends on numbers, or is on the meta device anyway."""
    tensors = _tensors((args, kwargs))
    if tensors and all(tensor.is_meta for tensor in tensors):
        return None
    shadow = _changed((args, kwargs), lambda t: torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device="meta"))
    if any(argument.name == "device" for argument in func._schema.arguments):
        shadow[1]["device"] = torch.device("meta")
    try:
        return func(*shadow[0], **shadow[1])
    except Exception:  # a size that numbers decide, a function that has no such form, an error that comes anyway
        return None


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in trees.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _changed(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return trees.tree_map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) and not leaf.is_meta else leaf, tree)


def _nbytes(tree: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(tree))
