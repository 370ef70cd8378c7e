"""Where a model's frozen part ends: found by a trial, in which nothing is sent.

Blocks are the children of a ``ModuleList`` or ``Sequential``. The cut lies after the last block below all that is
trained. What a block below it gives is taken at the cut, or put in there, by a subclass that the blocks get for a
while, as FSDP2 of torch does it.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ciphertune._support.torch_rng import capture_states
from ciphertune.client.clear import StandIns, standing_in
from ciphertune.outsourcing.walk import peft_types
from ciphertune.training import rng
from ciphertune.training.frozen_rows import storable
from ciphertune.training.inference import evaluating

Call = Callable[[Any], Any]
"""Calls the model with a batch, and gives what it returns."""

_EXTRA_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")
_ROWS = 2
_MOST_TRIED = 4
_HALVES = (torch.float16, torch.bfloat16)
_STAND_INS, _OTHERS = StandIns(0), StandIns(1000)


class Unfit(Exception):  # noqa: N818 - no error: a reason, which the caller puts into its own words
    """Why a model's frozen part cannot be kept."""


class _Reached(BaseException):
    """Ends a forward pass at the cut. It is no ``Exception``, so that no code of the model handles it."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


@dataclasses.dataclass
class _Pass:
    """What happens at the blocks below the cut, in one forward pass.

    ``watch`` notes what the last of them gives, ``reach`` ends the pass there, ``skip`` computes none of them and
    gives ``hidden``.
    """

    do: Literal["watch", "reach", "skip"]
    hidden: Tensor | None = None
    times: int = 0


_pass: contextvars.ContextVar[_Pass | None] = contextvars.ContextVar("ciphertune_frozen_pass", default=None)


@contextlib.contextmanager
def _doing(what: _Pass) -> Iterator[_Pass]:
    token = _pass.set(what)
    try:
        yield what
    finally:
        _pass.reset(token)


class _Below:
    """What a block below the cut is derived from while the cut is in use."""

    _frozen_last: bool
    _frozen_items: int | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        now = _pass.get()
        if now is None:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        if now.do == "skip":
            return self._skipped(now, args, kwargs)
        given = super().__call__(*args, **kwargs)  # type: ignore[misc]
        if not self._frozen_last:
            return given
        hidden = _hidden(given)
        now.times += 1
        if now.do == "reach":
            raise _Reached(hidden)
        now.hidden = hidden
        return given

    def _skipped(self, now: _Pass, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        got = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        assert now.hidden is not None
        if self._frozen_last:
            now.times += 1
            # Reentrant checkpointing asks that what it is given requires gradients.
            asked = got is not None and got.requires_grad and torch.is_grad_enabled()
            got = now.hidden.detach().requires_grad_(asked)
        return got if self._frozen_items is None else (got, *[None] * (self._frozen_items - 1))


@dataclasses.dataclass(frozen=True)
class Cut:
    """The end of the frozen part.

    Attributes:
        name: of the last block below it.
        blocks: those below it.
        items: of what each returns, as a tuple whose first item is the hidden state; None where it is the tensor.
        after: identities of modules that it does not depend on.
        by_token: whether a hidden state has a row for each token, which padding behind it does not change.
    """

    name: str
    blocks: tuple[nn.Module, ...]
    items: tuple[int | None, ...]
    after: frozenset[int]
    by_token: bool = False

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the blocks the subclass within a ``with`` block."""
        last = len(self.blocks) - 1
        kinds = [type(block) for block in self.blocks]
        made = {kind: type(kind.__name__, (_Below, kind), {"__module__": kind.__module__}) for kind in set(kinds)}
        try:
            for i, (block, kind, items) in enumerate(zip(self.blocks, kinds, self.items, strict=True)):
                block.__class__ = made[kind]
                vars(block).update(_frozen_last=i == last, _frozen_items=items)
            yield
        finally:
            for block, kind in zip(self.blocks, kinds, strict=True):
                block.__class__ = kind
                for name in ("_frozen_last", "_frozen_items"):
                    vars(block).pop(name, None)

    def reach(self, call: Call, batch: Any) -> Tensor:
        """What the frozen part gives for a batch, (rows, …); what follows is not computed."""
        with _doing(_Pass("reach")), torch.no_grad():
            try:
                call(batch)
            except _Reached as reached:
                return reached.hidden.detach()
        raise Unfit(f"{self.name!r} is not called in every pass")

    @contextlib.contextmanager
    def skipping(self, hidden: Tensor, after: StandIns | None = None) -> Iterator[None]:
        """Let the model compute from ``hidden`` on within a ``with`` block.

        Products before the cut, as those of an embedding at the workers, have stand-ins: nothing of them is used.

        Args:
            hidden: what ``reach`` gave.
            after: stands in for products after the cut, in a trial; None to evaluate them.
        """
        with _doing(_Pass("skip", hidden)) as now, standing_in(lambda: after if now.times else _OTHERS):
            yield


def find_cut(model: nn.Module, call: Call, batch: Any) -> Cut:
    """Find the end of a model's frozen part by calling it a few times with at most two rows of a batch.

    Nothing is sent: values made of the inputs stand in for products. Modes and random states stay as they are.

    Args:
        model: as it is trained.
        call: calls it.
        batch: on the model's device.

    Raises:
        Unfit: there is no such part, or what it gives is not the same every time.
    """
    for config in {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values():
        for name in _EXTRA_OUTPUTS:
            if getattr(config, name, False) is True:
                raise Unfit(f"the model's configuration says {name}, so what lies below is wanted each time")
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise Unfit("the model has batch normalisation, so that in training an example depends on its batch")
    few = rows_of(batch, range(min(_ROWS, count_rows(batch))))
    reasons = []
    with rng.preserved(), _training(model):
        for cut in _candidates(model, call, few)[:_MOST_TRIED]:
            try:
                return _tried(model, cut, call, few)
            except Unfit as why:
                reasons.append(str(why))
    raise Unfit(reasons[0] if reasons else "no block lies below everything that is trained")


@contextlib.contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Set training mode within a ``with`` block; each module's own mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _called() -> Iterator[set[int]]:
    """Identities of the modules that are called within a ``with`` block."""
    found: set[int] = set()
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, _: found.add(id(module)))
    try:
        yield found
    finally:
        handle.remove()


def rows_of(batch: Any, numbers: Sequence[int]) -> Any:
    """Some rows of a batch: of every tensor whose first dimension is that of rows."""
    count = count_rows(batch)
    index = list(numbers)

    def some(value: Any) -> Any:
        return value[index] if isinstance(value, Tensor) and value.dim() and len(value) == count else value

    if isinstance(batch, Mapping):
        return {name: some(value) for name, value in batch.items()}
    return [some(value) for value in batch]


def count_rows(batch: Any) -> int:
    """Rows of a batch: the first dimension of its first tensor."""
    values = batch.values() if isinstance(batch, Mapping) else batch
    return next((len(value) for value in values if isinstance(value, Tensor) and value.dim()), 0)


def _hidden(given: Any) -> Tensor:
    """The hidden state that a block gave. Raises ``Unfit`` where it gave more than that."""
    if isinstance(given, Tensor):
        return given
    if isinstance(given, tuple) and given and isinstance(given[0], Tensor) and all(v is None for v in given[1:]):
        return given[0]
    raise Unfit("its blocks give more than one tensor")


def _candidates(model: nn.Module, call: Call, batch: Any) -> list[Cut]:
    """Cuts before everything that is trained, the last first."""
    lists = {
        name: list(module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module)
    }
    trained = {id(m) for m in model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))}
    holding = {id(m) for m in model.modules() if any(p.requires_grad for p in m.parameters())}
    counts = {
        name: next((i for i, block in enumerate(blocks) if id(block) in holding), len(blocks))
        for name, blocks in lists.items()
    }
    ends = {id(lists[name][count - 1]): name for name, count in counts.items() if count}
    within = {id(m) for name, count in counts.items() if count for b in lists[name][count:] for m in b.modules()}
    order: list[str] = []
    gave: dict[int, Any] = {}
    started: set[int] = set()
    handles = []

    def before(module: nn.Module, _: Any) -> None:
        started.add(id(module))

    def after(module: nn.Module, _: Any, output: Any) -> None:
        gave[id(module)] = output
        name = ends.get(id(module))
        if name is not None and not started and name not in order:
            order.append(name)

    below = [block for name, count in counts.items() for block in lists[name][:count]]
    watched = {id(m): m for m in model.modules() if id(m) in trained or (id(m) in holding and id(m) in within)}
    try:
        handles += [module.register_forward_pre_hook(before) for module in watched.values()]
        handles += [block.register_forward_hook(after) for block in {id(b): b for b in below}.values()]
        with evaluating(model), standing_in(lambda: _STAND_INS):
            call(batch)
    finally:
        for handle in handles:
            handle.remove()
    if any(id(m) in trained and id(m) not in started and id(m) not in within for m in model.modules()):
        raise Unfit("a module that is trained is not called as one, so that it is not known when it is used")
    found = []
    for name in reversed(order):
        blocks = lists[name][: counts[name]]
        items = []
        for block in blocks:
            given = gave.get(id(block))
            items.append(len(given) if isinstance(given, tuple) else None)
        later = frozenset(id(m) for block in lists[name][counts[name] :] for m in block.modules())
        found.append(Cut(f"{name}.{len(blocks) - 1}".lstrip("."), tuple(blocks), tuple(items), later))
    return found


def _tried(model: nn.Module, cut: Cut, call: Call, batch: Any) -> Cut:
    """A cut that is right for this model. Raises ``Unfit``."""
    here = f"below the end of {cut.name!r}"
    modules = [m for block in cut.blocks for m in block.modules()]
    tuned, whole = peft_types()
    if any(isinstance(module, (*tuned, *whole)) for module in modules):
        raise Unfit(f"there are adapters {here}, frozen ones")
    with standing_in(lambda: _STAND_INS), cut.in_place():
        before = capture_states()
        with _called() as below:
            cut.reach(call, batch)
        if not all(map(torch.equal, before, capture_states())):
            raise Unfit(f"random numbers are drawn {here} (dropout): set it to 0 there")
        with evaluating(model):
            with _doing(_Pass("watch")) as seen, _called() as everywhere:
                wanted = _tensors(call(batch))
            hidden = seen.hidden
            if hidden is None or seen.times != 1:
                raise Unfit(f"{cut.name!r} is called {seen.times} times in a pass")
            if hidden.dim() < 2 or len(hidden) != count_rows(batch) or not storable(hidden):
                raise Unfit(f"what {cut.name!r} gives has no row for each example")
            with cut.skipping(hidden, after=_STAND_INS):
                got = _tensors(call(batch))
            if not _alike(wanted, got):
                raise Unfit(f"what follows {cut.name!r} depends on more than what it gives")
            alone = cut.reach(call, rows_of(batch, [0]))
            if not _alike([hidden[:1]], [alone]):
                raise Unfit(f"what {cut.name!r} gives for an example depends on the others of its batch")
            after = cut.after | (everywhere - below)
            return dataclasses.replace(cut, after=after, by_token=_by_token(cut, call, batch, hidden))


def _by_token(cut: Cut, call: Call, batch: Any, hidden: Tensor) -> bool:
    """Whether a hidden state has a row for each token, and padding behind a text leaves the others as they are."""
    ids = token_ids(batch)
    if ids is None or ids.shape[1] < 2 or hidden.shape[:2] != ids.shape:
        return False
    one = rows_of(batch, [0])
    width = ids.shape[1]
    padded = {**one, "attention_mask": one["attention_mask"].clone()}
    padded["attention_mask"][:, -1] = 0
    padded["attention_mask"][:, :-1] = 1
    shorter = {
        name: value[:, :-1] if isinstance(value, Tensor) and value.shape[:2] == (1, width) else value
        for name, value in padded.items()
    }
    try:
        return _alike([cut.reach(call, padded)[:, :-1]], [cut.reach(call, shorter)])
    except Exception:
        # The model takes no shorter texts: rows are kept whole.
        return False


def token_ids(batch: Any) -> Tensor | None:
    """Token ids with a mask of their own shape; None where a batch has none."""
    if not isinstance(batch, Mapping):
        return None
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(ids, Tensor) or not isinstance(mask, Tensor) or ids.dim() != 2 or mask.shape != ids.shape:
        return None
    return ids


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        return [each for item in value.values() for each in _tensors(item)]
    return [each for item in value for each in _tensors(item)] if isinstance(value, (list, tuple)) else []


def _alike(wanted: Sequence[Tensor], got: Sequence[Tensor]) -> bool:
    return len(wanted) == len(got) and all(
        left.shape == right.shape and _distance(left, right) <= (5e-2 if left.dtype in _HALVES else 1e-3)
        for left, right in zip(wanted, got, strict=True)
    )


def _distance(left: Tensor, right: Tensor) -> float:
    """Euclidean norm of a difference over that of ``left``; infinite where one is not a number and the other is."""
    left, right = left.double(), right.double()
    same = left.isnan() == right.isnan()
    difference = (left.nan_to_num() - right.nan_to_num()).norm() / left.nan_to_num().norm().clamp_min(1e-9)
    return float(difference) if bool(same.all()) else float("inf")
