"""Cryptographic parameters, which depend on the accumulator's width alone, and the form of ciphertexts.

Concrete's optimizer chooses the LWE dimension of a linear circuit from the width of its integers, the norm of its
weights, and how often a product may be wrong. Every module that is compiled here holds, beside its products, one
function whose norm is the largest that is allowed, so that all of them come out with the same parameters. The client
compiles that function alone and so knows, without weights and without trusting a worker's word, how to encrypt.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ciphertune.errors import PluginError
from ciphertune_concrete.circuit.library import fhe, signals_kept
from ciphertune_concrete.threads import prepare_thread

Words = NDArray[np.uint64]
Mode = Literal["execute", "simulate"]

BITS = range(16, 33)
"""Widths of accumulators that are offered."""
MAX_NORM = 8192
"""Largest Euclidean norm of a row of weight codes: 4096 of the largest 8-bit code, 127, stay below."""
MAX_FEATURES = 4096
"""Of either side: the largest that was compiled (docs/concrete.md); longer rows could exceed ``MAX_NORM``."""
FAILURE = 2.0**-40
"""Probability that one output is not exact; it is then off by a unit or so of the accumulator."""
SECURITY_BITS = 128
REQUEST_WORDS = 3
"""64-bit words of one fresh ciphertext: the 128-bit seed of its mask, and its body."""
STRIP = 64
"""Values that clients encrypt and decrypt at once."""
ANCHOR = "anchor"
"""Name of the function that fixes the parameters."""
UNKNOWN_FORM = "concrete-python serializes ciphertexts in a form that this version does not know"

# One at a time: the library does not say that it bears more.
COMPILING = threading.RLock()


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Parameters that both sides must agree on.

    Attributes:
        bits: width of inputs and outputs, two's complement.
        dimension: of the LWE secret, binary.
        variance: of a fresh ciphertext's error, on the torus.
    """

    bits: int
    dimension: int
    variance: float

    @property
    def reply_words(self) -> int:
        """64-bit words of one ciphertext that comes back."""
        return self.dimension + 1


@dataclasses.dataclass(frozen=True)
class Frame:
    """The library's serialized form of a ciphertext tensor, around its words.

    Only the words travel, as a tensor whose shape is checked; each side puts them into a frame of its own making, so
    the library's parser never sees bytes that a peer could shape.
    """

    head: bytes
    tail: bytes
    words: int

    @classmethod
    def of(cls, serialized: bytes, words: int, head: int) -> Frame:
        """The frame of a value of so many words that start at byte ``head``. Raises ``PluginError``."""
        end = head + 8 * words
        if len(serialized) <= end:
            raise PluginError(UNKNOWN_FORM)
        return cls(serialized[:head], serialized[end:], words)

    def is_like(self, other: Frame) -> bool:
        """Return whether the layout has as many bytes around the words as another one."""
        return (len(self.head), len(self.tail)) == (len(other.head), len(other.tail))

    def fill(self, words: Words) -> Any:
        """The library's value that holds these words."""
        assert words.size == self.words
        return fhe().Value.deserialize(b"".join((self.head, words.tobytes(), self.tail)))


def words_of(value: Any, count: int, like: Frame) -> Words:
    """The words of a library's value of one dimension. Raises ``PluginError`` if it is not so many.

    Args:
        value: from the library on this side, not from a peer.
        count: of words.
        like: a frame of values of this kind, of any size.
    """
    serialized = value.serialize()
    if len(serialized) != len(like.head) + 8 * count + len(like.tail):
        raise PluginError(UNKNOWN_FORM)
    return np.frombuffer(serialized, np.uint64, count, len(like.head))


@dataclasses.dataclass(frozen=True)
class Reference:
    """The compiled anchor: all that a client ever compiles.

    Attributes:
        parameters: that it came out with.
        specs: of the function ``anchor`` from ``STRIP`` values to ``STRIP`` values.
        request, reply: frames of a strip before and after evaluation.
        evaluation_keys: of any key: there is nothing in them, for linear circuits need none.
    """

    parameters: Parameters
    specs: Any = dataclasses.field(repr=False)
    request: Frame = dataclasses.field(repr=False)
    reply: Frame = dataclasses.field(repr=False)
    evaluation_keys: Any = dataclasses.field(repr=False)


@functools.cache
def reference(bits: int) -> Reference:
    """The anchor for accumulators of this width; about half a second the first time.

    Raises:
        PluginError: concrete-python is not installed, or is not as expected.
    """
    with signals_kept(), COMPILING, compiled({ANCHOR: (lambda x: x * MAX_NORM, STRIP)}, bits, "execute") as server:
        specs = server.client_specs
        described = json.loads(specs.serialize())
        (key,) = described["keyset"]["lweSecretKeys"]
        (circuit,) = described["circuits"]
        variance = circuit["inputs"][0]["typeInfo"]["lweCiphertext"]["encryption"]["variance"]
        parameters = Parameters(bits, int(key["params"]["lweDimension"]), float(variance))
        check_circuits(described, parameters, {ANCHOR: (STRIP, STRIP)})
        # A key that encrypts zeros for the sake of their form, and is forgotten.
        client = fhe().Client(specs)
        client.keygen()
        keys = client.evaluation_keys
        zeros = np.zeros(STRIP, np.int64)
        fresh = [client.encrypt(zeros, function_name=ANCHOR) for _ in range(2)]
        back = [server.run(value, evaluation_keys=keys, function_name=ANCHOR) for value in fresh]
    request, reply = (
        Frame.of(pair[0], STRIP * words, _head(STRIP * words, *pair))
        for pair, words in (
            ([value.serialize() for value in fresh], REQUEST_WORDS),
            ([value.serialize() for value in back], parameters.reply_words),
        )
    )
    return Reference(parameters, specs, request, reply, keys)


@contextlib.contextmanager
def compiled(functions: Mapping[str, tuple[Any, int]], bits: int, mode: Mode) -> Iterator[Any]:
    """The library's server of a module of linear functions; its files are deleted at the end.

    All functions have one key, inputs are signed, and inputs and outputs of one width.

    Args:
        functions: of a vector, by name, with its length.
        bits: width of inputs and outputs.
        mode: what to compile for.
    """
    library = fhe()
    prepare_thread()
    lowest = -(1 << (bits - 1))

    def traced(function: Any) -> Any:
        def body(x: Any) -> Any:
            y = function(library.hint(x, bit_width=bits, can_store=lowest))
            return library.hint(y, bit_width=bits, can_store=lowest)

        return body

    namespace: dict[str, Any] = {
        name: library.function({"x": "encrypted"})(_named(traced(function), name))
        for name, (function, _) in functions.items()
    }
    namespace["composition"] = library.NotComposable()
    module = library.module()(type("Linear", (), namespace))
    configuration = library.Configuration(
        p_error=FAILURE,
        compress_input_ciphertexts=True,
        fhe_execution=mode == "execute",
        fhe_simulation=mode == "simulate",
        # It would start threads of a second OpenMP beside torch's, and linear circuits gain nothing from it.
        loop_parallelize=False,
    )
    if configuration.security_level != SECURITY_BITS:
        raise PluginError(f"concrete-python aims at {configuration.security_level} bits, not {SECURITY_BITS}")
    samples = {name: [np.full(size, -1), np.full(size, 1)] for name, (_, size) in functions.items()}
    with COMPILING:
        done = module.compile(samples, configuration)
        server = (done.execution_runtime if mode == "execute" else done.simulation_runtime).val.server
    try:
        yield server
    finally:
        server.cleanup()


def check_circuits(described: Any, parameters: Parameters, sizes: Mapping[str, tuple[int, int]]) -> None:
    """Hold a compiled module's specification against what was asked for.

    Args:
        described: the specification, read from JSON.
        parameters: that it must have.
        sizes: inputs and outputs of each function by name.

    Raises:
        PluginError: it is another one.
    """
    try:
        keys = [key["params"]["lweDimension"] for key in described["keyset"]["lweSecretKeys"]]
        rest = [described["keyset"][f"lwe{kind}Keys"] for kind in ("Bootstrap", "Keyswitch")]
        found = {}
        for circuit in described["circuits"]:
            # Whether outputs are signed follows from samples, and matters to clients alone, who go by the anchor.
            found[circuit["name"]] = [_gate(*circuit["inputs"]), _gate(*circuit["outputs"])[:-1]]
    except (KeyError, TypeError, ValueError) as error:
        raise PluginError(f"concrete-python describes circuits in an unknown form: {type(error).__name__}") from error
    p = parameters
    common = (p.bits, p.dimension, p.variance)
    wanted = {name: [(k, "seed", *common, True), (n, "none", *common)] for name, (k, n) in sizes.items()}
    if keys != [p.dimension] or any(rest) or found != wanted:
        raise PluginError(
            "concrete-python compiled a circuit of other parameters than its anchor has; this is a defect, please "
            "report the size of the layer"
        )


def _gate(only: Any) -> tuple[Any, ...]:
    info = only["typeInfo"]["lweCiphertext"]
    (size,) = info["abstractShape"]["dimensions"]
    integer, encryption = info["encoding"]["integer"], info["encryption"]
    return (
        size,
        info["compression"],
        integer["width"],
        encryption["lweDimension"],
        encryption["variance"],
        integer["isSigned"],
    )


def _head(words: int, first: bytes, second: bytes) -> int:
    """Offset of the words: two encryptions of one value differ in all of them, and nowhere else."""
    apart = np.flatnonzero(np.frombuffer(first, np.uint64) != np.frombuffer(second, np.uint64))
    if len(first) != len(second) or apart.size == 0 or apart[-1] - apart[0] + 1 != words:
        raise PluginError(UNKNOWN_FORM)
    return 8 * int(apart[0])


def _named(function: Any, name: str) -> Any:
    function.__name__ = name
    return function
