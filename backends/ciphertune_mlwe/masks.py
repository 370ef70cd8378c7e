"""Masks of products: made before the data where that is wanted, each used once, and of no use afterwards."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import os
import queue
import threading
import weakref
from collections.abc import Callable
from typing import NoReturn, TypeVar

import torch
from torch import Tensor

from ciphertune.errors import SecurityError
from ciphertune_mlwe.clones import CloneWatch
from ciphertune_mlwe.mask_memory import MaskMemory
from ciphertune_mlwe.native import step_back
from ciphertune_mlwe.spare_memory import SPARE

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

BANK_COLUMNS = 256
"""Columns of a bank at most: those that one secret masks."""

_TOKENS_APART = 8
"""Tokens of a request up to which those of a bank lie apart: more fill a line of the cache anyway."""

_MOST_ORDERS = 1 << 14
"""Orders whose followers are remembered: products of a model times the numbers of tokens that they come with."""

_GONE = (
    "a mask is used once, in the process that made it; this one was used, or belongs to another process or a closed "
    "session. Nothing was sent"
)


class Block:
    """Masks under secrets of their own: A·s + e for requests and H·s for their replies.

    Args:
        features, outputs: rows of the two.
        columns: one for each token.
        device: where they live.

    Attributes:
        made: when, by ``CloneWatch.now``.
        copies: of the machine that had been noticed before its secrets were drawn.
    """

    def __init__(self, features: int, outputs: int, columns: int, device: torch.device) -> None:
        self.body = MaskMemory(features, columns, device)
        self.hint = MaskMemory(outputs, columns, device)
        self.columns = columns
        self.made = 0.0
        self.copies = 0

    def by_tokens(self) -> Block:
        """The same masks, with those of each token side by side: a request that takes one token reads no others'."""
        self.body, self.hint = self.body.by_columns(), self.hint.by_columns()
        return self

    @property
    def nbytes(self) -> int:
        """Memory of both."""
        return self.body.matrix.nbytes + self.hint.matrix.nbytes


class Mask:
    """Columns of one block, for one product.

    Args:
        block: of which these columns were handed to nobody else.
        columns: which.
    """

    def __init__(self, block: Block, columns: slice) -> None:
        self._block: Block | None = block
        self._columns = columns
        # Popping from a list is one step, whatever threads do.
        self._unused = [block.body]
        self._whole = columns == slice(0, block.columns)

    def take(self, use: Callable[[Tensor], _Result]) -> _Result:
        """Encrypt under this mask: ``use`` gets A·s + e, (features, tokens) int32, once and for all.

        Raises:
            SecurityError: it was used before, or is not what was made.
        """
        try:
            memory = self._unused.pop()
        except IndexError:
            raise SecurityError(_GONE) from None
        try:
            return self._used(memory, use)
        finally:
            self._forget(memory)

    def reveal(self, use: Callable[[Tensor], Tensor]) -> Tensor:
        """Decrypt under this mask: ``use`` gets H·s, (outputs, tokens) int32, as often as wanted.

        Raises:
            SecurityError: it was closed, before or in the meantime, or is not what was made.
        """
        found = self._used(None if self._block is None else self._block.hint, use)
        if self._block is None:
            raise SecurityError(_GONE)
        return found

    def close(self) -> None:
        """Forget what is left of it. Idempotent."""
        block, self._block = self._block, None
        with contextlib.suppress(IndexError):
            self._forget(self._unused.pop())
        if block is not None:
            self._forget(block.hint)

    def __del__(self) -> None:
        self.close()

    def _used(self, memory: MaskMemory | None, use: Callable[[Tensor], _Result]) -> _Result:
        if memory is None or not memory.intact:
            raise SecurityError(_GONE)
        found = use(memory.matrix[:, self._columns])
        # A fork or a close in the meantime must not let zeros out.
        if not memory.intact:
            raise SecurityError(_GONE)
        return found

    def _forget(self, memory: MaskMemory) -> None:
        """Whole blocks are given back to the system; of a bank these columns are overwritten."""
        if self._whole:
            memory.free()
        else:
            memory.overwrite(self._columns)

    def _refuse(self, *_: object) -> NoReturn:
        raise SecurityError("a mask cannot be copied: it is used once")

    __copy__ = __deepcopy__ = __reduce__ = __reduce_ex__ = _refuse


@dataclasses.dataclass(frozen=True)
class Order:
    """What a mask is for: a group's product in one direction, and how many tokens."""

    product: str
    tokens: int


@dataclasses.dataclass
class _Bank:
    block: Block
    used: int = 0


class MaskStock:
    """Masks of one session: made when asked for, or before.

    Requests of few tokens take columns of a bank, whose secret they share; all others have secrets of their own. A
    bank belongs to one caller: whoever knows what one column hides, and sees exact outputs, learns of the others of its
    bank. What is made ahead is nobody's until it is taken.

    Args:
        make: makes the block for an order. Called on any thread.
        size: bytes of such a block.
        bank_columns: of the banks for requests of few tokens, for a number of callers; 0 for secrets of their own.
        banked: bytes of banks. Those of the callers who asked least lately are dropped beyond it.
        ahead: bytes of masks that may be made before they are asked for; 0 for none.
        watch: notices that the machine was copied.

    Attributes:
        in_background: whether a thread makes masks ahead; to be set before the first is taken.
    """

    def __init__(
        self,
        make: Callable[[Order, bytes], Block],
        size: Callable[[Order], int],
        bank_columns: Callable[[int], int],
        banked: int,
        ahead: int,
        watch: CloneWatch,
    ) -> None:
        self._make = make
        self._size = size
        self._bank_columns = bank_columns
        self._banked = banked
        self._ahead = ahead
        self.in_background = True
        self._watch = watch
        self._process = os.getpid()
        self._lock = threading.Lock()
        # A weak reference's callback may put something here, whatever its thread is doing.
        self._asked: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._closed = False
        self._copies = 0
        # By caller, who asked last stands last, and by product.
        self._banks: dict[str, dict[str, _Bank]] = {}
        self._ready: dict[Order, collections.deque[Block]] = collections.defaultdict(collections.deque)
        self._next: dict[Order, Order] = {}
        self._last: Order | None = None
        self._thread: threading.Thread | None = None
        self._handed: weakref.WeakSet[Mask] = weakref.WeakSet()
        _STOCKS.add(self)

    def take(self, product: str, tokens: int, caller: str = "", message: Callable[[], bytes] = bytes) -> Mask:
        """A mask that nobody else gets, under no secret that another caller's mask has.

        Args:
            product: identity of the map.
            tokens: columns of the mask.
            caller: whose tokens they are.
            message: a hash of what will be masked, asked for where the mask is made now.

        Raises:
            SecurityError: the stock is closed, or of another process.
        """
        with self._lock:
            self._check()
            if (mask := self._next_of_bank(product, tokens, caller)) is not None:
                return mask
            callers = len(self._banks.keys() | {caller})
        order = self._order(product, tokens, callers)
        if order.tokens > tokens:
            return self._of_bank(order, tokens, caller, message)
        while True:
            block = self._find(order) or self._made(order, message())
            with self._lock:
                self._check()
                if self._usable(block):
                    return self._hand(block, slice(0, tokens))

    def make(self, product: str, tokens: int) -> float:
        """Make the masks that the next request of a product for so many tokens takes, or the bank that it may take of.

        Returns:
            The share of them that the request takes; 0 where none are made ahead.
        """
        if self._ahead == 0:
            return 0.0
        order = self._order(product, tokens, 1)
        block = self._made(order)
        with self._lock:
            self._check()
            self._ready[order] = collections.deque([block])
        return tokens / order.tokens

    def close(self) -> None:
        """Forget all masks, those that were handed out too."""
        with self._lock:
            self._closed = True
            self._drop()
            for mask in list(self._handed):
                mask.close()
        self._asked.put(None)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        # Only now: the thread may have forgotten a block that it was making.
        SPARE.clear()

    def make_next(self) -> bool:
        """Make what the last cycle of requests says comes next; whether there was something to make, and room.

        Called on the thread that makes masks ahead.
        """
        with self._lock:
            order = None if self._closed else self._wanted()
        if order is None:
            return False
        try:
            block = self._made(order)
        except Exception:
            # Whoever asks for this mask makes it, and sees what is wrong.
            log.info("masks are made ahead no more", exc_info=True)
            with self._lock:
                self._ahead = 0
                self._ready.clear()
            return False
        with self._lock:
            if not self._closed:
                self._ready[order].append(block)
            return not self._closed

    @property
    def closed(self) -> bool:
        """Whether it gives no more masks."""
        return self._closed

    def _hand(self, block: Block, columns: slice) -> Mask:
        mask = Mask(block, columns)
        self._handed.add(mask)
        return mask

    def _order(self, product: str, tokens: int, callers: int) -> Order:
        """What is made for a request: a bank where it takes half of one at most, else masks of its own."""
        columns = self._bank_columns(callers)
        return Order(product, columns if 2 * tokens <= columns else tokens)

    def _of_bank(self, order: Order, tokens: int, caller: str, message: Callable[[], bytes]) -> Mask:
        while True:
            block = self._find(order) or self._made(order, message())
            if tokens <= _TOKENS_APART:
                block = block.by_tokens()
            with self._lock:
                self._check()
                own = self._banks[caller] = self._banks.pop(caller, {})
                own[order.product] = _Bank(block)
                self._make_room(caller)
                if (mask := self._next_of_bank(order.product, tokens, caller)) is not None:
                    return mask

    def _next_of_bank(self, product: str, tokens: int, caller: str) -> Mask | None:
        """The next columns of a caller's bank for a product; None where it has none, or too few, or may not use them.

        A request that takes more than half of a bank has masks of its own.
        """
        own = self._banks.get(caller)
        bank = None if own is None else own.get(product)
        if own is None or bank is None:
            return None
        columns = bank.block.columns
        if bank.used + tokens > columns or 2 * tokens > columns or not self._usable(bank.block):
            return None
        if len(self._banks) > 1:
            self._banks[caller] = self._banks.pop(caller)
        taken = slice(bank.used, bank.used + tokens)
        bank.used += tokens
        if bank.used == columns:
            # Its memory goes with the masks that were handed out, and makes room for masks made ahead.
            del own[product]
            if self._thread is not None:
                self._asked.put(None)
        return self._hand(bank.block, taken)

    def _make_room(self, caller: str) -> None:
        """Drop banks of others while all together take too much."""
        sizes = {each: sum(bank.block.nbytes for bank in banks.values()) for each, banks in self._banks.items()}
        for each in list(self._banks):
            if each == caller or sum(sizes.values()) <= self._banked:
                break
            del sizes[each]
            for bank in self._banks.pop(each).values():
                bank.block.body.spoil()

    def _made(self, order: Order, message: bytes = b"") -> Block:
        """A new block, which tells whether the machine was copied after its secrets were drawn."""
        with self._lock:
            copies = self._copies
        block = self._make(order, message)
        block.made, block.copies = self._watch.now(), copies
        return block

    def _find(self, order: Order) -> Block | None:
        """A block made ahead, if there is one, and tell the thread what comes next."""
        with self._lock:
            if self._ahead == 0:
                return None
            self._check()
            found = None
            ready = self._ready.get(order)
            while ready and found is None:
                block = ready.popleft()
                found = block if self._usable(block) else None
            if self._last is not None:
                # The latest stand last.
                self._next.pop(self._last, None)
                self._next[self._last] = order
                if len(self._next) > _MOST_ORDERS:
                    del self._next[next(iter(self._next))]
            self._last = order
            if not self.in_background:
                return found
            if self._thread is None:
                held = weakref.ref(self, lambda _, asked=self._asked: asked.put(None))  # type: ignore[misc]
                arguments = held, self._asked
                self._thread = threading.Thread(
                    target=_make_ahead, args=arguments, name="ciphertune-masks", daemon=True
                )
                self._thread.start()
            self._asked.put(None)
            return found

    def _wanted(self) -> Order | None:
        """The first order that is to come and has no block yet; blocks that none of them takes are dropped."""
        if self._last is None or self._ahead == 0:
            return None
        banks = [bank for own in self._banks.values() for bank in own.values()]
        room = self._ahead - sum(bank.block.nbytes for bank in banks)
        coming: collections.Counter[Order] = collections.Counter()
        found: Order | None = None
        order = self._next.get(self._last)
        for _ in range(len(self._next)):
            room -= 0 if order is None else self._size(order)
            if order is None or room < 0:
                break
            coming[order] += 1
            if found is None and len(self._ready.get(order, ())) < coming[order]:
                found = order
            order = self._next.get(order)
        for order, blocks in list(self._ready.items()):
            while len(blocks) > coming[order]:
                blocks.pop()
            if not blocks:
                del self._ready[order]
        return found

    def _usable(self, block: Block) -> bool:
        """Whether a block may be handed out, asked right before that: the machine may be copied while it is made."""
        if self._watch.copied():
            self._copies += 1
            self._drop()
        return block.copies == self._copies and self._watch.fresh(block.made)

    def _check(self) -> None:
        if self._closed or os.getpid() != self._process:
            raise SecurityError(_GONE)

    def _drop(self) -> None:
        for own in self._banks.values():
            for bank in own.values():
                bank.block.body.spoil()
        for blocks in self._ready.values():
            for block in blocks:
                block.body.spoil()
        self._banks.clear()
        self._ready.clear()


def _make_ahead(stock: weakref.ref[MaskStock], asked: queue.SimpleQueue[None]) -> None:
    """Make masks ahead until the stock is closed, or forgotten by all who could ask it; in idle time alone."""
    step_back()
    while True:
        asked.get()
        found = stock()
        while found is not None and found.make_next():
            pass
        if found is None or found.closed:
            return
        del found


_STOCKS: weakref.WeakSet[MaskStock] = weakref.WeakSet()


def _forked() -> None:
    """In a forked process nothing of its parent's masks may be used; its locks may be held by threads that are gone."""
    for stock in list(_STOCKS):
        stock._lock = threading.Lock()
        stock._asked = queue.SimpleQueue()
        stock._thread = None
        stock._closed = True
        stock._banks.clear()
        stock._ready.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
