"""The worker half: products with ciphertext, token by token. Holds no secret and never imports the client half."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ciphertune.backend import Buffers, Direction, WorkerHalf
from ciphertune.errors import ProtocolError
from ciphertune.protocol import DEFAULT_LIMITS
from ciphertune_concrete.circuit.circuits import Circuit, LinearCircuits
from ciphertune_concrete.circuit.library import PACKAGE, compiler, fhe, version
from ciphertune_concrete.circuit.params import (
    BITS,
    MAX_FEATURES,
    MAX_NORM,
    REQUEST_WORDS,
    Mode,
    Words,
    reference,
    words_of,
)


class CircuitWorker(WorkerHalf):
    """Evaluates circuits that are compiled for the weights.

    Args:
        fields: what the client's ``open_fields`` sent.

    Raises:
        ProtocolError: the fields are not those of a client of this version, or of its version of concrete-python.
        PluginError: concrete-python is not installed here.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        bits, mode, theirs = fields.get("bits"), fields.get("mode"), fields.get("library")
        if type(bits) is not int or bits not in BITS or mode not in ("execute", "simulate"):
            raise ProtocolError(f"bits must be between {BITS[0]} and {BITS[-1]}, and mode execute or simulate")
        if theirs != version():
            told = theirs if isinstance(theirs, str) and len(theirs) < 32 else "another version"
            raise ProtocolError(
                f"the client has {PACKAGE} {told} and this worker {version()}: circuits of one cannot be used by the "
                "other, so install the same at both"
            )
        self._bits = bits
        self._mode: Mode = mode
        self._reference = reference(bits)
        self._parameters = self._reference.parameters
        agreed = {"dimension": self._parameters.dimension, "variance": self._parameters.variance}
        if any(type(fields.get(name)) is not type(value) or fields[name] != value for name, value in agreed.items()):
            raise ProtocolError(
                f"the client encrypts with other parameters than {PACKAGE} {version()} chooses here: install the same "
                "version of CipherTune at both"
            )
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def prepare(self, weight: Tensor) -> LinearCircuits:
        """See ``WorkerHalf.prepare``. Circuits are compiled, or found on disk, when they are first evaluated."""
        if weight.dtype != torch.int8 or weight.dim() != 2:
            raise ProtocolError(f"this backend evaluates int8 weights, not {weight.dtype}")
        if max(weight.shape) > MAX_FEATURES:
            raise ProtocolError(f"a circuit of {tuple(weight.shape)} is over the limit of {MAX_FEATURES} a side")
        values = weight.to(torch.float32)
        if any(float(torch.linalg.vector_norm(values, dim=side).max()) > MAX_NORM for side in (0, 1)):
            raise ProtocolError(f"a row or column of the weight has a norm over {MAX_NORM}")
        return LinearCircuits(weight, self._bits, self._mode)

    @property
    def form(self) -> tuple[int, str]:
        """See ``WorkerHalf.form``."""
        return self._bits, self._mode

    def reply_bytes(self, prepared: LinearCircuits, direction: Direction, request: Buffers) -> int:
        """See ``WorkerHalf.reply_bytes``."""
        x = request.get("x")
        words = self._parameters.reply_words if self._mode == "execute" else 1
        return 0 if x is None or x.dim() == 0 else 8 * len(x) * prepared.sizes(direction)[1] * words

    def evaluate(self, prepared: LinearCircuits, direction: Direction, request: Buffers) -> Buffers:
        """See ``WorkerHalf.evaluate``.

        Buffers: ``x`` (tokens, features, 3) int64, each a seeded ciphertext; the reply's ``y`` (tokens, outputs,
        dimension + 1) int64. Simulated: integers, (tokens, features) and (tokens, outputs).
        """
        features, outputs = prepared.sizes(direction)
        encrypted = self._mode == "execute"
        shape = (features, REQUEST_WORDS) if encrypted else (features,)
        x = request.get("x")
        if x is None or x.dtype != torch.int64 or x.dim() == 0 or tuple(x.shape) != (max(len(x), 1), *shape):
            raise ProtocolError(f"expected an int64 buffer 'x' of shape (tokens, {', '.join(map(str, shape))})")
        words = outputs * (self._parameters.reply_words if encrypted else 1)
        most = DEFAULT_LIMITS.buffer_bytes
        if 8 * len(x) * words > most:
            raise ProtocolError(f"the reply to {len(x)} tokens would be over the limit of {most} bytes")
        circuit = prepared.get(direction)
        tokens = x.cpu().contiguous().numpy()
        y = np.empty((len(x), words), np.uint64)

        def evaluate(index: int) -> None:
            y[index] = self._run(circuit, tokens[index], words)

        try:
            if len(x) == 1:
                evaluate(0)
            else:
                list(self._threads().map(evaluate, range(len(x))))
        except RuntimeError as error:
            raise ProtocolError("the circuit refused the request") from error
        rest = (-1,) if encrypted else ()
        return {"y": torch.from_numpy(y.view(np.int64).reshape(len(x), outputs, *rest))}

    def close(self) -> None:
        """Let the threads go."""
        with self._lock:
            if self._pool is not None:
                self._pool.shutdown(wait=False)
                self._pool = None

    def _run(self, circuit: Circuit, token: Any, words: int) -> Words:
        if self._mode == "simulate":
            with circuit.runner() as (client, server):
                sent = client.simulate_prepare_input(compiler().Value(token), 0)
                back = client.simulate_process_output(server.simulate([sent])[0], 0)
            return np.asarray(back.to_py_val()).astype(np.int64).view(np.uint64)
        value = circuit.request.fill(token.view(np.uint64))
        with circuit.runner() as server:
            (back,) = server.call([value._inner], self._reference.evaluation_keys.server_keyset)
        return words_of(fhe().Value(back), words, self._reference.reply)

    def _threads(self) -> ThreadPoolExecutor:
        """Threads of a worker: a circuit takes one, and lets others run meanwhile."""
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(torch.get_num_threads(), "ciphertune-circuit")
            return self._pool
