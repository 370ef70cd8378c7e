"""A cache of frozen activations: what the blocks below everything that is trained give, kept at the client."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ciphertune._support.absent_tensor import AbsentTensor, WithoutWeight
from ciphertune._support.torch_compat import autocast_dtype
from ciphertune._support.version import __version__
from ciphertune.errors import TrainingError
from ciphertune.outsourcing.convert import sessions_of
from ciphertune.selection import SessionOptions
from ciphertune.training import batches
from ciphertune.training.frozen_cut import Cut, Unfit, count_rows, find_cut, rows_of, token_ids
from ciphertune.training.frozen_rows import RowStore
from ciphertune.training.losses import Loss, on_device, outputs_of
from ciphertune.weights import LayerInfo

log = logging.getLogger(__name__)

_NO_CONTENT = ("labels",)


@dataclasses.dataclass
class _Reading:
    """One pass over the data of some name, such as an epoch.

    Attributes:
        number: of the pass, from 1.
        found: rows that were kept already.
        made: rows that were computed.
        seen: how often each content came in it.
    """

    number: int = 1
    found: int = 0
    made: int = 0
    seen: collections.Counter[bytes] = dataclasses.field(default_factory=collections.Counter)


class FrozenCache:
    """What a model's frozen blocks give, row by row, kept on disk from epoch to epoch and from run to run.

    For each batch the rows that are missing are computed as one smaller batch, and kept; then the model goes on from
    the rows of all. A row is known by its content (tokens, mask, positions, whatever else the model gets but labels),
    and by how often that content came before in the same pass over the data: rows of equal content are kept apart, so
    that what is sent never tells which examples are equal.

    Args:
        model: that is trained.
        loss: as of ``batch_loss``.
        limit: bytes on disk at most.
    """

    def __init__(self, model: nn.Module, loss: Loss | None, limit: int) -> None:
        self._model = model
        self._loss = loss
        self._limit = limit
        self._cut: Cut | None = None
        self._store: RowStore | None = None
        self._stack = contextlib.ExitStack()
        self._readings: dict[str, _Reading] = {}
        self._given_up = False

    def __enter__(self) -> FrozenCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the model as it was. Idempotent."""
        self._stack.close()
        self._store = None

    def _open(self, batch: Any) -> None:
        """Find the frozen part by a batch, unless that was done. Nothing is sent."""
        if self._cut is None:
            try:
                self._cut = find_cut(self._model, self._call, batch)
            except Unfit as why:
                raise TrainingError(
                    f"frozen_cache: there are no outputs to keep: {why}. Train adapters in the upper blocks alone "
                    "(layers_to_transform), or leave frozen_cache out"
                ) from None
            log.info("frozen activations are kept of all up to %s", self._cut.name)
        if self._store is None:
            self._store = RowStore(_context(self._model, self._cut), self._limit)
            self._stack.callback(self._store.close)
            self._stack.enter_context(self._cut.in_place())

    def begin(self, name: str) -> None:
        """Begin a pass over the data of this name, such as an epoch."""
        last = self._readings.get(name)
        if last is None:
            self._readings[name] = _Reading()
            return
        log.info("frozen activations, %s, pass %d: %d rows found, %d made", name, last.number, last.found, last.made)
        if last.number > 1 and last.made and not last.found and not self._given_up:
            log.warning(
                "frozen_cache has no effect any more: no example of a whole pass over the data had been kept. Either "
                "the data is drawn anew in each (masks, augmentation), or there is no room for it"
            )
            self._given_up = True
        self._readings[name] = _Reading(last.number + 1)

    @contextlib.contextmanager
    def going_on(self, name: str, batch: Any) -> Iterator[None]:
        """Let the model's call with this batch begin at the end of the frozen part, within a ``with`` block.

        Args:
            name: of the pass over the data that the batch is of.
            batch: that the model is called with.

        Raises:
            TrainingError: there is no frozen part, or what it gives is not the same every time.
            CacheError: nothing can be kept on this disk.
        """
        if self._given_up:
            yield
            return
        batch = on_device(self._model, batch)
        self._open(batch)
        assert self._cut is not None
        hidden = self._rows(name, batch)
        with self._cut.skipping(hidden):
            yield

    def _call(self, batch: Any) -> Any:
        return outputs_of(self._model, batch, self._loss)

    def _rows(self, name: str, batch: Any) -> Tensor:
        """What the frozen part gives for a batch, (rows, …): from disk, or computed."""
        cut, store = self._cut, self._store
        assert cut is not None
        assert store is not None
        device = next(self._model.parameters()).device
        count = count_rows(batch)
        lengths = _lengths(batch, cut.by_token)
        contents = [self._content(name, batch, row, length) for row, length in enumerate(lengths)]
        kept = {row: store.read(content, device) for row, content in enumerate(contents)}
        found = {row: value for row, value in kept.items() if value is not None}
        missing = [row for row in range(count) if row not in found]
        reading = self._readings.setdefault(name, _Reading())
        reading.found += len(found)
        reading.made += len(missing)
        if missing:
            part = batch if len(missing) == count else rows_of(batch, missing)
            try:
                made = cut.reach(self._call, part)
            except Unfit as why:
                raise TrainingError(f"frozen_cache: a batch is computed otherwise than the first one: {why}") from None
            for row, value in zip(missing, made, strict=True):
                found[row] = value[: lengths[row]]
                store.write(contents[row], found[row])
        return _together([found[row] for row in range(count)], lengths, batch)

    def _content(self, name: str, batch: Any, row: int, length: int | None) -> bytes:
        """A digest of one row of a batch, and of how often it came before in this pass."""
        state = hashlib.sha256(f"{name}|{autocast_dtype(next(self._model.parameters()).device.type)}".encode())
        count = count_rows(batch)
        ids = token_ids(batch)
        for key, value in _inputs(batch):
            state.update(f"|{key}:".encode())
            if isinstance(value, Tensor) and value.dim() and len(value) == count:
                value = value[row]
                if length is not None and ids is not None and value.shape[:1] == ids.shape[1:]:
                    value = value[:length]
            state.update(batches.content(value))
        content = state.digest()
        seen = self._readings.setdefault(name, _Reading()).seen
        seen[content] += 1
        return content + seen[content].to_bytes(4, "big")


def _inputs(batch: Any) -> list[tuple[str, Any]]:
    """What of a batch the frozen part may depend on."""
    if isinstance(batch, Mapping):
        return [(name, value) for name, value in sorted(batch.items()) if name not in _NO_CONTENT]
    return [(str(place), value) for place, value in enumerate(batch[:-1])]


def _lengths(batch: Any, by_token: bool) -> list[int | None]:
    """Tokens of each row without the padding behind them; None for rows that are kept whole.

    Padding is what is not attended to and has no label. Padding before a text stays: of its last token comes the
    prediction of the text's first.
    """
    ids = token_ids(batch)
    if not by_token or ids is None:
        return [None] * count_rows(batch)
    real = batch["attention_mask"] != 0
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.shape == ids.shape:
        real = real | (labels != batches.IGNORED_LABEL)
    places = torch.arange(1, ids.shape[1] + 1, device=real.device)
    return [max(1, int(length)) for length in (real * places).amax(dim=1)]


def _together(rows: Sequence[Tensor], lengths: Sequence[int | None], batch: Any) -> Tensor:
    """Rows as one tensor, with zeros where there is padding."""
    ids = token_ids(batch)
    if ids is None or None in lengths:
        return torch.stack(list(rows))
    out = rows[0].new_zeros(len(rows), ids.shape[1], *rows[0].shape[1:])
    for place, row in enumerate(rows):
        out[place, : len(row)] = row
    return out


def _context(model: nn.Module, cut: Cut) -> bytes:
    """SHA-256 of all that the frozen part depends on beside a batch."""
    state = hashlib.sha256()

    def add(*values: Any) -> None:
        state.update("|".join(map(str, values)).encode() + b"\n")

    add(__version__, torch.__version__, cut.by_token)
    for session in sessions_of(model):
        # Endpoints, transports and timeouts change nothing that is computed.
        others = {
            field.name for kind in (SessionOptions, type(session.choice.transport).Options) for field in _fields(kind)
        }
        options = {name: text for name, text in session.selection.options.items() if name not in others}
        add(session.selection.backend, sorted(options.items()))
    for module in model.modules():
        if id(module) in cut.after or any(p.requires_grad for p in module.parameters(recurse=False)):
            continue
        config: Any = getattr(module, "config", None)
        if hasattr(config, "to_diff_dict"):
            told = {key: value for key, value in config.to_diff_dict().items() if not key.startswith("_")}
            add(json.dumps(told, sort_keys=True, default=str))
        add(type(module).__qualname__, "" if isinstance(module, WithoutWeight) else module.extra_repr())
        info = getattr(module, "info", None)
        for each in [info] if isinstance(info, LayerInfo) else getattr(module, "infos", ()):
            add(each.name, each.digest())
        for key, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None and not isinstance(value, AbsentTensor):
                add(key, batches.content(value).hex())
    return state.digest()


def _fields(kind: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(kind)
