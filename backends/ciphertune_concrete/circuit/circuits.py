"""A weight's circuits: compiled or found in the cache when they are first asked for, and loaded."""

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ciphertune.backend import Direction
from ciphertune.cache import Hold
from ciphertune.errors import PluginError
from ciphertune_concrete.circuit import cache
from ciphertune_concrete.circuit.library import compiler, fhe, version
from ciphertune_concrete.circuit.params import (
    ANCHOR,
    MAX_NORM,
    REQUEST_WORDS,
    STRIP,
    Frame,
    Mode,
    check_circuits,
    compiled,
    reference,
)

log = logging.getLogger(__name__)

_FORMAT = 1
"""Version of the contents of a cached folder, beyond what its hash is made from."""
_LIBRARY = ("sharedlib.so", "sharedlib.dylib", "program_info.concrete.params.json", "compilation_feedback.json")
_FACTS = "facts.json"
_PRODUCT = "product"


@dataclasses.dataclass(frozen=True)
class Circuit:
    """The circuit of one matrix M of shape (N, K), from K values to the N of their product with it.

    Attributes:
        request: frame of K fresh ciphertexts.
        runners: the library's circuit, once for every thread: two calls of one at a time give wrong results.
        held: keeps its files while it is loaded.
    """

    request: Frame = dataclasses.field(repr=False)
    runners: queue.LifoQueue[Any] = dataclasses.field(repr=False)
    held: Hold = dataclasses.field(repr=False)

    @contextlib.contextmanager
    def runner(self) -> Iterator[Any]:
        """Yield a runner that no other thread uses meanwhile."""
        one = self.runners.get()
        try:
            yield one
        finally:
            self.runners.put(one)


class LinearCircuits:
    """The circuits of a weight's two directions. Knows nothing of any session.

    Compiling holds up everything else in the process, and models have units that are never asked for, so that it
    happens when a direction is first used.

    Args:
        weight: (N, K) int8.
        bits, mode: as agreed with the client.
    """

    def __init__(self, weight: Tensor, bits: int, mode: Mode) -> None:
        self._weight = weight
        self._reference = reference(bits)
        self._mode: Mode = mode
        self._found: dict[Direction, Circuit] = {}
        self._lock = threading.Lock()

    def sizes(self, direction: Direction) -> tuple[int, int]:
        """Inputs and outputs."""
        rows, columns = self._weight.shape
        return (columns, rows) if direction == "forward" else (rows, columns)

    def get(self, direction: Direction) -> Circuit:
        """The circuit of a direction, compiled if it never was. Raises ``PluginError``."""
        with self._lock:
            if direction not in self._found:
                codes = self._weight.cpu().numpy()
                self._found[direction] = self._make(np.ascontiguousarray(codes if direction == "forward" else codes.T))
            return self._found[direction]

    def _make(self, codes: NDArray[np.int8]) -> Circuit:
        p = self._reference.parameters
        facts = [_FORMAT, version(), platform.machine(), self._mode, p.bits, p.dimension, p.variance, codes.shape]
        key = hashlib.sha256(json.dumps(facts).encode() + codes.tobytes()).hexdigest()
        place = cache.find_or_make(key, lambda folder: self._compile(codes, folder))
        try:
            return self._load(place, codes.shape)
        except Exception as error:
            log.warning("a compiled circuit cannot be used and is compiled again", exc_info=error)
            cache.forget(place)
        return self._load(cache.find_or_make(key, lambda folder: self._compile(codes, folder)), codes.shape)

    def _compile(self, codes: NDArray[np.int8], folder: Path) -> None:
        """Fill a folder with the worker's part of a circuit. Clients need nothing of it: see ``params``."""
        matrix = codes.astype(np.int64).T
        inputs = len(matrix)
        functions: dict[str, tuple[Any, int]] = {
            _PRODUCT: (lambda x: x @ matrix, inputs),
            ANCHOR: (lambda x: x * MAX_NORM, STRIP),
        }
        with (
            _refusals(codes.shape),
            compiled(functions, self._reference.parameters.bits, self._mode) as server,
        ):
            frame = Frame(b"", b"", 0)
            if self._mode == "execute":
                # A key that encrypts zeros for the sake of their form, and is forgotten.
                client = fhe().Client(server.client_specs)
                client.keygen()
                zeros = client.encrypt(np.zeros(inputs, np.int64), function_name=_PRODUCT).serialize()
                frame = Frame.of(zeros, inputs * REQUEST_WORDS, len(self._reference.request.head))
            facts = {"mode": self._mode, "head": frame.head.hex(), "tail": frame.tail.hex()}
            (folder / _FACTS).write_text(json.dumps(facts), encoding="ascii")
            made = Path(server._library.get_output_dir_path())
            for name in _LIBRARY:
                if (made / name).exists():
                    shutil.copyfile(made / name, folder / name)

    def _load(self, place: Path, shape: tuple[int, ...]) -> Circuit:
        outputs, inputs = shape
        held = Hold(place)
        facts = json.loads((place / _FACTS).read_text(encoding="ascii"))
        if facts["mode"] != self._mode:
            # The library would crash.
            raise PluginError("a compiled circuit is for another mode than its name says")
        library = compiler().Library(str(place))
        program = library.get_program_info()
        frame = Frame(bytes.fromhex(facts["head"]), bytes.fromhex(facts["tail"]), inputs * REQUEST_WORDS)
        simulated = self._mode == "simulate"
        if not simulated:
            sizes = {_PRODUCT: (inputs, outputs), ANCHOR: (STRIP, STRIP)}
            check_circuits(json.loads(program.serialize()), self._reference.parameters, sizes)
            if not frame.is_like(self._reference.request):
                raise PluginError("a compiled circuit's frame has another size than the anchor's")
        runners: queue.LifoQueue[Any] = queue.LifoQueue()
        for _ in range(torch.get_num_threads()):
            runner = compiler().ServerProgram(library, simulated).get_server_circuit(_PRODUCT)
            if simulated:
                client = compiler().ClientProgram.create_simulated(program).get_client_circuit(_PRODUCT)
                runners.put((client, runner))
            else:
                runners.put(runner)
        return Circuit(frame, runners, held)


@contextlib.contextmanager
def _refusals(shape: tuple[int, ...]) -> Iterator[None]:
    """Say of what size a circuit was that the library would not compile; its own words may quote weights."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        log.error("concrete-python did not compile a circuit", exc_info=error)
        raise PluginError(
            f"concrete-python did not compile a circuit of {shape[1]} inputs and {shape[0]} outputs "
            f"({type(error).__name__}; the worker's log has more)"
        ) from error
