"""The worker half: products with the library. Holds a compression key; never imports keys or the client half."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ciphertune.backend import Buffers, Direction, WorkerHalf
from ciphertune.errors import ProtocolError
from ciphertune_concrete.glwe import wire
from ciphertune_concrete.glwe.library import load, panics_are
from ciphertune_concrete.glwe.params import KEY_WORDS, NAME, REQUEST_WORDS, SEED_WORDS, SIZE, input_blocks, reply_words


class _Key:
    """A compression key in the library's form."""

    def __init__(self, value: Any) -> None:
        self.value = value


# Sessions that bring the same key share it: each would take its 134 MB again.
_keys: weakref.WeakValueDictionary[tuple[bool, bytes], _Key] = weakref.WeakValueDictionary()
_keys_lock = threading.Lock()


@dataclasses.dataclass
class GlweWeight:
    """A weight, and on a machine with CUDA the blocks of it that are on the device already.

    Attributes:
        codes: (N, K) int8.
        on_device: by direction and first output.
    """

    codes: Tensor
    on_device: dict[tuple[Direction, int], Any] = dataclasses.field(default_factory=dict, repr=False)


class GlweWorker(WorkerHalf):
    """Evaluates products on encrypted tokens, on CUDA where the library finds it, else on the processor's cores.

    A product takes time for every token and output: each output is switched to the reply's key, whatever the number of
    inputs. The processor's products run one token at a time, since the library lets no other thread of Python run
    meanwhile.

    Args:
        fields: what the client's ``open_fields`` sent.
        evaluation_key: what its ``evaluation_key`` sent.

    Raises:
        ProtocolError: they are not those of a client of this version.
        PluginError: the library is not installed here.
    """

    def __init__(self, fields: Mapping[str, Any], evaluation_key: Buffers) -> None:
        if fields.get("parameters") != NAME:
            raise ProtocolError(f"unknown parameter set; known: {NAME}")
        key = evaluation_key.get("key")
        if len(evaluation_key) != 1 or key is None or key.dtype != torch.int64 or tuple(key.shape) != (KEY_WORDS,):
            raise ProtocolError(f"the compression key was cut short or is none: expected 'key' int64 ({KEY_WORDS},)")
        self._library = load()
        self._cuda = bool(self._library.is_cuda_enabled() and self._library.is_cuda_available())
        self._key: _Key | None = self._shared_key(key)

    def prepare(self, weight: Tensor) -> GlweWeight:
        """See ``WorkerHalf.prepare``."""
        if weight.dtype != torch.int8:
            raise ProtocolError(f"this backend evaluates int8 weights, not {weight.dtype}")
        return GlweWeight(weight)

    def reply_bytes(self, prepared: GlweWeight, direction: Direction, request: Buffers) -> int:
        """See ``WorkerHalf.reply_bytes``."""
        values = request.get("values")
        outputs = prepared.codes.shape[0 if direction == "forward" else 1]
        return 0 if values is None or values.dim() == 0 else 8 * len(values) * sum(reply_words(outputs))

    def evaluate(self, prepared: GlweWeight, direction: Direction, request: Buffers) -> Buffers:
        """See ``WorkerHalf.evaluate``.

        Returns:
            ``values`` (tokens, words) int64: the ciphertexts of a token's outputs, 2048 outputs each.
        """
        matrix = prepared.codes if direction == "forward" else prepared.codes.t()
        outputs, features = matrix.shape
        values, seeds = self._read(request, features)
        key = self._key
        if key is None:
            raise ProtocolError("the session is closed")
        step = len(values) if self._cuda else 1
        rows: list[list[Tensor]] = [[] for _ in range(0, len(values), step)]
        for start in range(0, outputs, SIZE):
            block = matrix[start : start + SIZE]
            operand = self._operand(prepared, direction, start, block, key)
            for index, row in enumerate(rows):
                if self._key is None:
                    raise ProtocolError("the session was closed while its product was evaluated")
                part = slice(index * step, (index + 1) * step)
                row.append(self._product(values[part], seeds[part], features, operand, len(block), key))
        return {"values": torch.cat([torch.cat(row, dim=1) for row in rows])}

    @property
    def nbytes(self) -> int:
        """See ``WorkerHalf.nbytes``: the key."""
        return 8 * KEY_WORDS

    def close(self) -> None:
        """Let go of the key."""
        self._key = None

    def _shared_key(self, key: Tensor) -> _Key:
        name = (self._cuda, hashlib.sha256(key.contiguous().numpy().data.cast("B")).digest())
        with _keys_lock:
            shared = _keys.get(name)
            if shared is None:
                kind = self._library.CudaCompressionKey if self._cuda else self._library.CpuCompressionKey
                with panics_are(ProtocolError, "concrete-ml-extensions cannot read the compression key"):
                    shared = _Key(kind.deserialize(wire.key_bytes(key)))
                _keys[name] = shared
            return shared

    def _read(self, request: Buffers, features: int) -> tuple[Tensor, Tensor]:
        found = []
        for name, words in (("values", REQUEST_WORDS), ("seeds", SEED_WORDS)):
            buffer = request.get(name)
            shape = (input_blocks(features), words)
            if buffer is None or buffer.dtype != torch.int64 or buffer.dim() != 3 or tuple(buffer.shape[1:]) != shape:
                raise ProtocolError(f"expected an int64 buffer {name!r} of shape (tokens, {shape[0]}, {shape[1]})")
            found.append(buffer)
        values, seeds = found
        if not 1 <= len(values) == len(seeds):
            raise ProtocolError(f"values of {len(values)} tokens came with seeds of {len(seeds)}")
        return values, seeds

    def _operand(self, prepared: GlweWeight, direction: Direction, start: int, block: Tensor, key: _Key) -> Any:
        """A block of up to 2048 rows of the matrix as the library takes it: (features, rows), mod 2^64."""
        known = prepared.on_device.get((direction, start))
        if known is not None:
            return known
        operand = block.to("cpu", torch.int64).t().numpy().view(np.uint64)
        if self._cuda:
            # It depends on the key's size alone, so any session may use it.
            operand = self._library.make_cuda_clear_matrix(operand, key.value)
            prepared.on_device[direction, start] = operand
        return operand

    def _product(self, values: Tensor, seeds: Tensor, features: int, operand: Any, outputs: int, key: _Key) -> Tensor:
        library = self._library
        multiply = library.cuda_matrix_multiplication if self._cuda else library.cpu_matrix_multiplication
        with panics_are(ProtocolError, "concrete-ml-extensions cannot evaluate the request"):
            encrypted = library.EncryptedMatrix.deserialize(wire.request_bytes(values, seeds, features))
            blob = multiply(encrypted, operand, key.value).serialize()
        return wire.reply_values(blob, len(values), outputs)
