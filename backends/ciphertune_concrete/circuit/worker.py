"""The worker half: circuits compiled for weights, evaluated on ciphertext. Never imports the client half."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import platform
import queue
import shutil
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ciphertune.backend import Buffers, Direction, WorkerHalf
from ciphertune.errors import PluginError, ProtocolError
from ciphertune.protocol import DEFAULT_LIMITS
from ciphertune_concrete.circuit import cache
from ciphertune_concrete.circuit.library import PACKAGE, compiler, fhe, version
from ciphertune_concrete.circuit.params import (
    ANCHOR,
    BITS,
    MAX_FEATURES,
    MAX_NORM,
    REQUEST_WORDS,
    STRIP,
    Frame,
    Mode,
    Words,
    check_circuits,
    compiled,
    reference,
    words_of,
)

log = logging.getLogger(__name__)

# What else than the inputs of the hash decides what lies in a cached folder.
_FORMAT = 1
_KEPT = ("sharedlib.so", "sharedlib.dylib", "program_info.concrete.params.json", "compilation_feedback.json")
_FRAMES = "frames.json"


@dataclasses.dataclass(frozen=True)
class Circuit:
    """One direction of one weight, ready to be evaluated.

    Attributes:
        in_features, out_features: K and N.
        request: frame of a token, K fresh ciphertexts.
        servers: the library's circuit, once a thread: two calls of one at a time give wrong results.
    """

    in_features: int
    out_features: int
    request: Frame = dataclasses.field(repr=False)
    servers: queue.LifoQueue[Any] = dataclasses.field(repr=False)

    @contextlib.contextmanager
    def server(self) -> Iterator[Any]:
        """One that nobody else uses meanwhile."""
        one = self.servers.get()
        try:
            yield one
        finally:
            self.servers.put(one)


class CircuitWorker(WorkerHalf):
    """Compiles a circuit for every weight, once, and evaluates it token by token.

    Args:
        fields: what the client's ``open_fields`` sent.

    Raises:
        ProtocolError: the fields are not those of a client of this version, or of its version of concrete-python.
        PluginError: concrete-python is not installed here.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        bits, mode, theirs = fields.get("bits"), fields.get("mode"), fields.get("library")
        if not isinstance(bits, int) or bits not in BITS or mode not in ("execute", "simulate"):
            raise ProtocolError(f"bits must be between {BITS[0]} and {BITS[-1]}, and mode execute or simulate")
        if theirs != version():
            told = theirs if isinstance(theirs, str) and len(theirs) < 32 else "another version"
            raise ProtocolError(
                f"the client has {PACKAGE} {told} and this worker {version()}: circuits of one cannot be used by the "
                "other, so install the same at both"
            )
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

    def prepare(self, weight: Tensor) -> dict[Direction, Circuit]:
        """See ``WorkerHalf.prepare``: a circuit for each direction, compiled or from the cache."""
        if weight.dtype != torch.int8 or weight.dim() != 2:
            raise ProtocolError(f"this backend evaluates int8 weights, not {weight.dtype}")
        if max(weight.shape) > MAX_FEATURES:
            raise ProtocolError(f"a circuit of {tuple(weight.shape)} is over the limit of {MAX_FEATURES} a side")
        codes = np.ascontiguousarray(weight.cpu().numpy())
        squares = codes.astype(np.int64) ** 2
        if max(squares.sum(0).max(), squares.sum(1).max()) > MAX_NORM**2:
            raise ProtocolError(f"a row or column of the weight has a norm over {MAX_NORM}")
        p = self._parameters
        facts = [_FORMAT, version(), platform.machine(), self._mode, p.bits, p.dimension, p.variance, codes.shape]
        key = hashlib.sha256(json.dumps(facts).encode() + codes.tobytes()).hexdigest()
        place = cache.find_or_make(key, lambda folder: self._compile(codes, folder))
        try:
            return self._load(place, codes.shape)
        except Exception as error:
            log.warning("a compiled circuit cannot be used and is compiled again", exc_info=error)
            cache.forget(place)
        return self._load(cache.find_or_make(key, lambda folder: self._compile(codes, folder)), codes.shape)

    def evaluate(self, prepared: dict[Direction, Circuit], direction: Direction, request: Buffers) -> Buffers:
        """See ``WorkerHalf.evaluate``.

        Buffers: ``x`` (tokens, features, 3) int64, each a seeded ciphertext; the reply's ``y`` (tokens, outputs,
        dimension + 1) int64. Simulated: integers, (tokens, features) and (tokens, outputs).
        """
        circuit = prepared[direction]
        x = request.get("x")
        encrypted = self._mode == "execute"
        shape = (circuit.in_features, REQUEST_WORDS) if encrypted else (circuit.in_features,)
        if (
            x is None
            or x.dtype != torch.int64
            or x.dim() != 1 + len(shape)
            or tuple(x.shape[1:]) != shape
            or not len(x)
        ):
            raise ProtocolError(f"expected an int64 buffer 'x' of shape (tokens, {', '.join(map(str, shape))})")
        words = circuit.out_features * (self._parameters.reply_words if encrypted else 1)
        if 8 * len(x) * words > DEFAULT_LIMITS.buffer_bytes:
            raise ProtocolError(
                f"the reply to {len(x)} tokens is over the limit of {DEFAULT_LIMITS.buffer_bytes} bytes"
            )
        tokens = x.contiguous().numpy()
        y = np.empty((len(x), words), np.uint64)

        def token(index: int) -> None:
            y[index] = self._run(circuit, tokens[index])

        try:
            if len(x) == 1:
                token(0)
            else:
                list(self._threads().map(token, range(len(x))))
        except RuntimeError as error:
            raise ProtocolError("the circuit refused the request") from error
        rest = (-1,) if encrypted else ()
        return {"y": torch.from_numpy(y.view(np.int64).reshape(len(x), circuit.out_features, *rest))}

    def close(self) -> None:
        """Let the threads go."""
        with self._lock:
            if self._pool is not None:
                self._pool.shutdown(wait=False)
                self._pool = None

    def _run(self, circuit: Circuit, token: Any) -> Words:
        if self._mode == "simulate":
            with circuit.server() as (client, server):
                sent = client.simulate_prepare_input(compiler().Value(token), 0)
                back = client.simulate_process_output(server.simulate([sent])[0], 0)
            return np.asarray(back.to_py_val()).astype(np.int64).view(np.uint64)
        value = circuit.request.fill(token.view(np.uint64))
        with circuit.server() as server:
            (back,) = server.call([value._inner], self._reference.evaluation_keys.server_keyset)
        return words_of(fhe().Value(back), circuit.out_features * self._parameters.reply_words, self._reference.reply)

    def _threads(self) -> ThreadPoolExecutor:
        """Evaluation is one thread's work and lets others run."""
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(torch.get_num_threads(), "ciphertune-circuit")
            return self._pool

    def _compile(self, codes: Any, folder: Path) -> None:
        """Fill a folder with the worker's part of a circuit: the client's needs no weight, so it makes its own."""
        rows, columns = codes.shape
        matrix = codes.astype(np.int64)
        functions: dict[str, tuple[Any, int]] = {
            "forward": (lambda x: x @ matrix.T, columns),
            "backward": (lambda g: g @ matrix, rows),
            ANCHOR: (lambda x: x * MAX_NORM, STRIP),
        }
        with compiled(functions, self._parameters.bits, self._mode) as server:
            frames = {name: ["", ""] for name in ("forward", "backward")}
            if self._mode == "execute":
                # A key that encrypts zeros for the sake of their form, and is forgotten.
                client = fhe().Client(server.client_specs)
                client.keygen()
                head = len(self._reference.request.head)
                for name, size in (("forward", columns), ("backward", rows)):
                    zeros = client.encrypt(np.zeros(size, np.int64), function_name=name)
                    frame = Frame.of(zeros.serialize(), size * REQUEST_WORDS, head)
                    frames[name] = [frame.head.hex(), frame.tail.hex()]
            (folder / _FRAMES).write_text(json.dumps({"mode": self._mode, **frames}), encoding="ascii")
            made = Path(server._library.get_output_dir_path())
            for name in _KEPT:
                if (made / name).exists():
                    shutil.copyfile(made / name, folder / name)

    def _load(self, place: Path, shape: tuple[int, ...]) -> dict[Direction, Circuit]:
        rows, columns = shape
        sizes = {"forward": (columns, rows), "backward": (rows, columns)}
        kept = json.loads((place / _FRAMES).read_text(encoding="ascii"))
        if kept["mode"] != self._mode:
            # The library would crash.
            raise PluginError("a compiled circuit is for another mode than its name says")
        library = compiler().Library(str(place))
        program = library.get_program_info()
        if self._mode == "execute":
            check_circuits(json.loads(program.serialize()), self._parameters, {**sizes, ANCHOR: (STRIP, STRIP)})
        found: dict[Direction, Circuit] = {}
        directions: tuple[Direction, ...] = ("forward", "backward")
        for name in directions:
            like = self._reference.request
            head, tail = map(bytes.fromhex, kept[name])
            if self._mode == "execute" and (len(head), len(tail)) != (len(like.head), len(like.tail)):
                raise PluginError("a compiled circuit's frame has another size than the anchor's")
            frame = Frame(head, tail, sizes[name][0] * REQUEST_WORDS)
            found[name] = Circuit(*sizes[name], frame, queue.LifoQueue())
        for _ in range(torch.get_num_threads()):
            server = compiler().ServerProgram(library, self._mode == "simulate")
            for name in directions:
                one = server.get_server_circuit(name)
                if self._mode == "simulate":
                    one = compiler().ClientProgram.create_simulated(program).get_client_circuit(name), one
                found[name].servers.put(one)
        return found
