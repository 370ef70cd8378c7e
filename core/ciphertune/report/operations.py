"""The share of a training step's arithmetic that the workers do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode

from ciphertune.hookspecs import hookimpl

if TYPE_CHECKING:
    from ciphertune.client.session import Session
    from ciphertune.traffic import Exchange


class StepOperations:
    """A hook plugin that counts the multiply-adds of the first optimizer step it sees.

    At the client: matrix products, convolutions and attention, as ``torch.utils.flop_counter`` counts them, without
    those of encryption. At the workers: tokens times weights of every product, as it would be in the clear.

    Args:
        session: the session whose products are counted; those of others are left out.

    Attributes:
        at_workers, at_client: multiply-adds. Both are 0 until the step is done, and stay so where an operation of it
            cannot be counted.
    """

    def __init__(self, session: Session) -> None:
        self._weights = {layer.name: layer.in_features * layer.out_features for layer in session.layers}
        self._session = session
        self._mode: _Counting | None = None
        self._counting = threading.Lock()
        self._outsourced = 0
        self._trainer: Any = None
        self.at_workers = 0
        self.at_client = 0

    @property
    def fraction(self) -> float | None:
        """Multiply-adds at the workers over all; None if no step was counted."""
        whole = self.at_workers + self.at_client
        return self.at_workers / whole if whole else None

    @hookimpl(trylast=True)
    def ciphertune_training_start(self, trainer: Any) -> None:
        """Begin to count the operations of the first run."""
        if self._trainer is None:
            self._trainer, self._mode = trainer, _Counting()
            self._mode.__enter__()  # type: ignore[no-untyped-call]

    @hookimpl(tryfirst=True)
    def ciphertune_training_step(self, trainer: Any) -> None:
        """Stop counting after the first step, since counting takes time."""
        if trainer is self._trainer and self._mode is not None:
            if not self._mode.unknown:
                self.at_client, self.at_workers = self._mode.multiply_adds, self._outsourced
            self._stop()

    @hookimpl(tryfirst=True)
    def ciphertune_training_end(self, trainer: Any) -> None:
        """Stop counting where a run ended before its first step."""
        if trainer is self._trainer:
            self._stop()

    @hookimpl(trylast=True)
    def ciphertune_before_request(self) -> None:
        """Pause counting on this thread: encryption is no operation of the model."""
        if self._mode is not None:
            self._mode.paused.here = True

    @hookimpl(tryfirst=True)
    def ciphertune_after_reply(self, session: Session, exchange: Exchange) -> None:
        """Resume counting, and add the product's multiply-adds."""
        if self._mode is None:
            return
        self._mode.paused.here = False
        if session is self._session:
            with self._counting:
                self._outsourced += exchange.tokens * sum(self._weights[name] for name in exchange.layers)

    def _stop(self) -> None:
        mode, self._mode = self._mode, None
        if mode is not None:
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.paused = threading.local()  # on which threads a product is under way
        self.multiply_adds = 0
        self.unknown = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = None if getattr(self.paused, "here", False) else _formula(func)
        if formula is not None:
            try:
                # A multiplication and an addition each are an operation there.
                self.multiply_adds += int(formula(*args, **kwargs, out_val=out)) // 2
            except Exception:  # a formula that does not know these shapes must not end a run
                self.unknown = True
        return out


def _formula(func: Any) -> Callable[..., Any] | None:
    packet = getattr(func, "_overloadpacket", None)
    known: Callable[..., Any] | None = flop_counter.flop_registry.get(packet)
    if known is None and packet is not None:
        known = _ON_CPU.get(packet.__name__)
    return known


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
    return flop_counter.sdpa_flop_count(query.shape, key.shape, value.shape)  # type: ignore[no-untyped-call]


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
    return flop_counter.sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)  # type: ignore[no-untyped-call]


# torch has no formula for these.
_ON_CPU: dict[str, Callable[..., Any]] = {
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
}
