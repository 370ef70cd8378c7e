"""Layout of the matrices of concrete-ml-extensions 0.1.9, so that bytes from a wire are checked before it reads them.

All of it is little-endian 64-bit words. What is not ciphertext, a seed or padding follows from the sizes alone, and the
library allocates and indexes by it, so it must be what this version writes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import Tensor

Words = npt.NDArray[np.uint64]

SIZE = 2048
"""Coefficients of a polynomial, which is what a row of a matrix is cut into."""
REQUEST_BITS = 39
REPLY_BITS = 26
"""Bits that are kept of a coefficient; Zama's default parameters."""


def request_words(tokens: int, features: int) -> int:
    """Words of an encrypted matrix of shape (tokens, features)."""
    return 3 + tokens * len(_request_row(features)[0])


def reply_words(tokens: int, outputs: int) -> int:
    """Words of an encrypted result of shape (tokens, outputs)."""
    return 1 + tokens * len(_reply_row(outputs)[0])


def request_tokens(data: Tensor, features: int) -> int | None:
    """Tokens of an encrypted matrix with this many features, or None if the bytes are none."""
    words = _as_words(data)
    row = len(_request_row(features)[0])
    if words is None or len(words) < 3 + row or (len(words) - 3) % row:
        return None
    tokens = (len(words) - 3) // row
    ends = words[0] == words[-2] == tokens and words[-1] == features
    return tokens if ends and _matches(words[1:-2], tokens, _request_row(features)) else None


def is_reply(data: Tensor, tokens: int, outputs: int) -> bool:
    """Return whether bytes are an encrypted result of this shape."""
    words = _as_words(data)
    if words is None or len(words) != reply_words(tokens, outputs) or words[0] != tokens:
        return False
    return _matches(words[1:], tokens, _reply_row(outputs))


def _as_words(data: Tensor) -> Words | None:
    raw = data.cpu().contiguous().numpy()
    return np.frombuffer(raw.tobytes(), dtype="<u8") if len(raw) % 8 == 0 else None


def _matches(words: Words, rows: int, row: tuple[Words, npt.NDArray[np.bool_]]) -> bool:
    values, fixed = row
    return bool((words.reshape(rows, -1)[:, fixed] == values[fixed]).all())


def _request_row(features: int) -> tuple[Words, npt.NDArray[np.bool_]]:
    """The words of a row, and which of them are fixed: for each polynomial its body, two words of a seed, and sizes."""
    blocks = -(-features // SIZE)
    body = SIZE * REQUEST_BITS // 64
    block = [body, *[None] * body, REQUEST_BITS, SIZE, REQUEST_BITS, 1, SIZE, None, None, 0, 0, 64]
    return _template([blocks, *block * blocks, features])


def _reply_row(outputs: int) -> tuple[Words, npt.NDArray[np.bool_]]:
    """The words of a row: for each polynomial its mask and as many values of its body as are used, and sizes."""
    parts = [min(SIZE, outputs - start) for start in range(0, outputs, SIZE)]
    row: list[int | None] = [len(parts)]
    for part in parts:
        packed = -(-REPLY_BITS * (SIZE + part) // 64)
        row += [packed, *[None] * packed, REPLY_BITS, SIZE + part, 1, SIZE, part, 0, 0, 64]
    return _template(row)


def _template(row: list[int | None]) -> tuple[Words, npt.NDArray[np.bool_]]:
    values = np.array([0 if word is None else word for word in row], dtype="<u8")
    return values, np.array([word is not None for word in row])
