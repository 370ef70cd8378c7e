"""The arithmetic of encryption and decryption, twice: as tensor operations for any device, and as compiled loops.

Both give the same ciphertexts for the same seeds, and the same decryptions up to float32 rounding.
"""

from __future__ import annotations

import abc
import threading

import numpy as np
import torch
from torch import Tensor

from ciphertune_mlwe import native
from ciphertune_mlwe.keys import MasterKey
from ciphertune_mlwe.params import PLANES
from ciphertune_mlwe.planes import compose, low_bits, split
from ciphertune_mlwe.prg import Bytes, centred_binomial, error_row_bytes, expand, room
from ciphertune_mlwe.ring import NegacyclicRing
from ciphertune_mlwe.scratch import Scratch

_NATIVE_DEGREE = 256
_NATIVE_MAX_RANK = 8


class Engine(abc.ABC):
    """Encryption and decryption under one key on one device. Safe to use from several threads.

    Args:
        key: the secret key.
        device: where tensors live.
    """

    def __init__(self, key: MasterKey, device: torch.device) -> None:
        self.parameters = key.parameters
        self.device = device
        self._key = key
        self._secrets = torch.empty(0, dtype=torch.float64)
        self._lock = threading.Lock()

    def secrets(self, tokens: int) -> Tensor:
        """Transforms of the secret blocks for this many tokens, derived as longer batches need them."""
        count = -(-tokens // self.parameters.degree)
        with self._lock:
            have = len(self._secrets)
            if count > have:
                fresh = self._transform(torch.stack([self._key.secret_block(j) for j in range(have, count)]))
                self._secrets = torch.cat([self._secrets, fresh]) if have else fresh
            return self._secrets[:count]

    def close(self) -> None:
        """Overwrite the secrets."""
        with self._lock:
            self._secrets.zero_()
            self._secrets = torch.empty(0, dtype=torch.float64)

    @abc.abstractmethod
    def _transform(self, blocks: Tensor) -> Tensor:
        """Transforms of secret blocks (count, rank, degree) float64."""

    @abc.abstractmethod
    def encrypt(self, x: Tensor, scale: Tensor, seed: bytes, error_seed: bytes, planes: int) -> Tensor:
        """Make ciphertext bodies.

        Args:
            x: (tokens, features) float32.
            scale: (tokens,) float64.
            seed: 32 bytes that the public elements are made from.
            error_seed: 32 bytes that the errors are made from; secret, used once.
            planes: digits kept, from the top.

        Returns:
            (features, planes, tokens) int8.
        """

    @abc.abstractmethod
    def decrypt(self, a: Tensor, b: Tensor, unit: Tensor) -> Tensor:
        """Phases times a unit per token.

        Args:
            a: (rows, planes, n) int8, the top digits of values mod 2^32.
            b: (rows, planes, tokens) int8, as a; maybe of fewer digits.
            unit: (tokens,) float64, what one 2^-32 of the modulus is worth.

        Returns:
            (tokens, rows) float32, of any strides.
        """


class TensorEngine(Engine):
    """Portable tensor operations, in chunks of features that stay in the cache; tensors stay on the device."""

    def __init__(self, key: MasterKey, device: torch.device) -> None:
        super().__init__(key, device)
        self._ring = NegacyclicRing(key.parameters.degree, device)
        self._scratch = Scratch(device)
        self._bytes: Bytes = np.empty(0, dtype=np.uint8)
        self._busy = threading.Lock()

    def _transform(self, blocks: Tensor) -> Tensor:
        return self._ring.transform(blocks.to(self.device))

    def encrypt(self, x: Tensor, scale: Tensor, seed: bytes, error_seed: bytes, planes: int) -> Tensor:
        """See ``Engine.encrypt``."""
        tokens, features = x.shape
        secrets, noise_bytes = self.secrets(tokens), error_row_bytes(tokens)
        b = torch.empty(features, planes, tokens, dtype=torch.int8, device=self.device)
        with self._busy:
            for start, stop in self._chunks(features, len(secrets)):
                count = stop - start
                public = self._random(seed, start, count, PLANES * self.parameters.dimension)
                digits = public.view(torch.int8).view(count, PLANES, -1)
                body = low_bits(self._ring.inner(self._values(digits), secrets, self._scratch))[:, :tokens]
                body += centred_binomial(self._random(error_seed, start, count, noise_bytes), tokens)
                body += low_bits(x[:, start:stop].t().to(torch.float64) * scale)
                split(body, b[start:stop], PLANES - planes)
        return b

    def decrypt(self, a: Tensor, b: Tensor, unit: Tensor) -> Tensor:
        """See ``Engine.decrypt``."""
        rows, _, tokens = b.shape
        a_lift, b_lift = (8 * (PLANES - part.shape[1]) for part in (a, b))
        secrets = self.secrets(tokens)
        out = torch.empty(rows, tokens, dtype=torch.float32, device=self.device)
        with self._busy:
            for start, stop in self._chunks(rows, len(secrets)):
                mask = low_bits(self._ring.inner(self._values(a[start:stop]), secrets, self._scratch))[:, :tokens]
                body = self._scratch.get("body", (stop - start, tokens), torch.float64)
                # Lifting both to the top of 32 bits makes wrap-around the centred remainder.
                phase = low_bits(compose(b[start:stop], body)).bitwise_left_shift_(b_lift)
                out[start:stop] = phase.sub_(mask.bitwise_left_shift_(a_lift)) * unit
        return out.t()

    def close(self) -> None:
        """Overwrite the secrets and free scratch memory."""
        super().close()
        with self._busy:
            self._scratch.clear()
            self._bytes = np.empty(0, dtype=np.uint8)

    def _chunks(self, features: int, blocks: int) -> list[tuple[int, int]]:
        step = max(8, min(128, (1 << 17) // (blocks * self._ring.half)))
        return [(start, min(start + step, features)) for start in range(0, features, step)]

    def _random(self, key: bytes, first: int, rows: int, row_bytes: int) -> Tensor:
        """Keystream rows as (rows, row_bytes) uint8, valid until the next call."""
        nbytes = rows * row_bytes
        if len(self._bytes) < room(nbytes):
            self._bytes = np.empty(room(nbytes), dtype=np.uint8)
        filled = expand(key, first, rows, row_bytes, self._bytes)
        return torch.from_numpy(filled).view(rows, row_bytes).to(self.device)

    def _values(self, digits: Tensor) -> Tensor:
        """Transforms of ring elements given as planes (count, planes, n) int8."""
        count, rank, degree = len(digits), self.parameters.rank, self.parameters.degree
        values = compose(digits, self._scratch.get("ring", (count, rank * degree), torch.float64))
        out = self._scratch.get("transform", (count, rank, degree // 2), torch.complex128)
        return self._ring.transform(values.view(count, rank, degree), out)


class NativeEngine(Engine):
    """Compiled loops on the CPU: one pass over every value, rows spread over threads."""

    _CHUNK = 64

    def __init__(self, key: MasterKey, device: torch.device) -> None:
        super().__init__(key, device)
        library = native.library()
        if library is None:
            raise RuntimeError("the native library is not available")
        self._library = library

    @staticmethod
    def fits(key: MasterKey, device: torch.device) -> bool:
        """Return whether the compiled loops exist and fit these parameters."""
        p = key.parameters
        fits = p.degree == _NATIVE_DEGREE and p.rank <= _NATIVE_MAX_RANK and device.type == "cpu"
        return fits and native.library() is not None

    def _transform(self, blocks: Tensor) -> Tensor:
        blocks = blocks.contiguous()
        out = torch.empty(*blocks.shape, dtype=torch.float64)
        self._library.ct_transform_secrets(
            native.pointer(blocks), native.pointer(out), len(blocks) * self.parameters.rank
        )
        return out

    def encrypt(self, x: Tensor, scale: Tensor, seed: bytes, error_seed: bytes, planes: int) -> Tensor:
        """See ``Engine.encrypt``."""
        x, scale = x.contiguous(), scale.contiguous()
        tokens, features = x.shape
        secrets, noise_bytes = self.secrets(tokens), error_row_bytes(tokens)
        public_bytes = PLANES * self.parameters.dimension
        b = torch.empty(features, planes, tokens, dtype=torch.int8)

        def task(start: int, stop: int) -> None:
            chunk = min(self._CHUNK, stop - start)
            public = np.empty(room(chunk * public_bytes), dtype=np.uint8)
            noise = np.empty(room(chunk * noise_bytes), dtype=np.uint8)
            for row in range(start, stop, chunk):
                count = min(chunk, stop - row)
                expand(seed, row, count, public_bytes, public)
                expand(error_seed, row, count, noise_bytes, noise)
                status = self._library.ct_encrypt(
                    public.ctypes.data,
                    noise.ctypes.data,
                    noise_bytes,
                    native.pointer(x) + row * x.element_size(),
                    features,
                    native.pointer(scale),
                    native.pointer(secrets),
                    self.parameters.rank,
                    tokens,
                    count,
                    planes,
                    PLANES - planes,
                    native.pointer(b) + row * planes * tokens,
                )
                _check(status)
            noise.fill(0)

        native.over_rows(features, 8, task)
        return b

    def decrypt(self, a: Tensor, b: Tensor, unit: Tensor) -> Tensor:
        """See ``Engine.decrypt``."""
        a, b, unit = a.contiguous(), b.contiguous(), unit.contiguous()
        rows, b_planes, tokens = b.shape
        a_planes = a.shape[1]
        secrets = self.secrets(tokens)
        y = torch.empty(tokens, rows, dtype=torch.float32)

        def task(start: int, stop: int) -> None:
            status = self._library.ct_decrypt(
                native.pointer(a) + start * a_planes * self.parameters.dimension,
                native.pointer(b) + start * b_planes * tokens,
                native.pointer(secrets),
                native.pointer(unit),
                self.parameters.rank,
                tokens,
                stop - start,
                a_planes,
                b_planes,
                native.pointer(y) + start * y.element_size(),
                rows,
            )
            _check(status)

        native.over_rows(rows, 8, task)
        return y


def make_engine(key: MasterKey, device: torch.device) -> Engine:
    """The faster engine that works here."""
    return NativeEngine(key, device) if NativeEngine.fits(key, device) else TensorEngine(key, device)


def _check(status: int) -> None:
    if status:
        raise MemoryError("the native encryption loops could not allocate their scratch memory")
