"""Speeds of a machine at the parts of a training step: measured here or elsewhere, kept as JSON, and scaled."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ciphertune._support.atomic import replace_file
from ciphertune.backend import DIRECTIONS, Backend, Direction, LinearMap
from ciphertune.errors import ConfigError

FORMAT = "ciphertune-speeds-3"

Phase = Literal["encrypt", "evaluate", "decrypt", "ahead"]
_PHASES: tuple[Phase, ...] = ("encrypt", "evaluate", "decrypt", "ahead")


@dataclasses.dataclass(frozen=True)
class ProductSpeed:
    """Seconds of one product's phases.

    Attributes:
        direction: of the product.
        tokens, in_features, out_features: T, K and N of ``y = x Mᵀ``.
        encrypt, evaluate, decrypt: seconds.
        ahead: seconds of what the client computes before the data are there.
    """

    direction: Direction
    tokens: int
    in_features: int
    out_features: int
    encrypt: float
    evaluate: float
    decrypt: float
    ahead: float = 0.0


@dataclasses.dataclass(frozen=True)
class Line:
    """Seconds that grow with the number of tokens."""

    fixed: float
    per_token: float

    def at(self, tokens: int) -> float:
        """Seconds for so many tokens."""
        return self.fixed + self.per_token * tokens


@dataclasses.dataclass(frozen=True)
class ClientCompute:
    """Seconds that a client computes itself in a step, beside encryption and decryption.

    Attributes:
        measured: whether the model's own blocks were run; a guess otherwise.
        before: what comes before each product of a group of layers in one direction, by ``product_name``.
        begin: what comes before the first product of all.
        head: what comes before the first backward product: output head and loss, forward and backward.
        end: what comes after the last product.
        optimizer: seconds of the optimizer, whatever the tokens.
    """

    measured: bool
    before: dict[str, Line]
    begin: Line
    head: Line
    end: Line
    optimizer: float


@dataclasses.dataclass(frozen=True)
class LinkSpeed:
    """Cost of a transport beside the network's.

    Attributes:
        rate: bytes a second on one connection.
        overhead: seconds a request, beside those of its bytes.
        worker_byte, worker_request: seconds of the worker's processor for each byte, and for each request: what a busy
            worker spends. A part of them is not waited for by a client that is alone, as sender and receiver of a
            message work at the same time.
    """

    rate: float
    overhead: float
    worker_byte: float
    worker_request: float

    @property
    def client_rate(self) -> float:
        """Bytes a second that the client's end carries, on however many connections: what the worker's end leaves."""
        byte = 1.0 / self.rate - self.worker_byte
        return 1.0 / byte if byte > 0.0 else math.inf

    def waited(self, nbytes: int) -> float:
        """Seconds that a client waits for a request and its reply of so many bytes together."""
        return self.overhead + nbytes / self.rate

    def worked(self, nbytes: int) -> float:
        """Seconds of the worker's processor for them."""
        return self.worker_request + nbytes * self.worker_byte


@dataclasses.dataclass(frozen=True)
class Speeds:
    """Speeds of one machine.

    Attributes:
        to: selection string of the backend, without transport and endpoints.
        machine: its processor, threads and torch, for people.
        products: of several sizes.
        copy: seconds to copy one float32 value.
        client_compute: None where only a worker's part was measured.
        link: None where no transport was measured.
    """

    to: str
    machine: dict[str, str]
    products: tuple[ProductSpeed, ...]
    copy: float
    client_compute: ClientCompute | None
    link: LinkSpeed | None

    def seconds(self, backend: Backend, phase: Phase, linear_map: LinearMap, tokens: int) -> float:
        """Seconds of a phase of any product: rates of the measured ones, the nearest in size counting most.

        Rates are seconds over what ``Backend.work`` says of a product.
        """
        amount = float(getattr(backend.work(linear_map, tokens), phase))
        if amount == 0:
            return 0.0
        alike = [p for p in self.products if p.direction == linear_map.direction] or list(self.products)
        size = _size(tokens, linear_map.in_features, linear_map.out_features)
        weights, rates = [], []
        for product in alike:
            theirs = _size(product.tokens, product.in_features, product.out_features)
            distance = sum((a - b) ** 2 for a, b in zip(size, theirs, strict=True))
            there = LinearMap("", product.direction, product.in_features, product.out_features, 1.0)
            rate = getattr(product, phase) / float(getattr(backend.work(there, product.tokens), phase))
            weights.append(1.0 / (0.01 + distance) ** 2)
            rates.append(math.log(max(rate, 1e-300)))
        mean = sum(w * rate for w, rate in zip(weights, rates, strict=True)) / sum(weights)
        return math.exp(mean) * amount


def _size(tokens: int, in_features: int, out_features: int) -> tuple[float, float, float]:
    return math.log(tokens), math.log(in_features), math.log(out_features)


def product_name(layers: str, direction: Direction) -> str:
    """Key of a group of layers in one direction in ``ClientCompute.before``.

    >>> product_name("q_proj+k_proj+v_proj", "backward")
    'q_proj+k_proj+v_proj backward'
    """
    return f"{layers} {direction}"


def write_speeds(speeds: Speeds, path: Path) -> None:
    """Keep speeds as JSON. Raises ``ConfigError`` where the file cannot be written."""
    text = json.dumps({"format": FORMAT, **dataclasses.asdict(speeds)}, indent=1)
    try:
        replace_file(path, text.encode() + b"\n")
    except OSError as error:
        raise ConfigError(f"cannot write speeds to {path}: {error.strerror}") from error


def read_speeds(path: Path) -> Speeds:
    """Speeds from a file that ``write_speeds`` wrote. Raises ``ConfigError`` for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read speeds from {path}: {error.strerror}") from error
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ConfigError(
            f"{path} is no file of speeds (format {FORMAT}): write one with ciphertune plan --save-speeds"
        )
    try:
        return _speeds(found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged: {error!r}; measure again with ciphertune plan --save-speeds") from error


def _speeds(found: Mapping[str, Any]) -> Speeds:
    products = tuple(_product(row) for row in found["products"])
    if not products:
        raise ValueError("no product was measured")
    computed, link = found["client_compute"], found["link"]
    return Speeds(
        to=str(found["to"]),
        machine={str(name): str(value) for name, value in found["machine"].items()},
        products=products,
        copy=_number(found, "copy"),
        client_compute=None if computed is None else _client_compute(computed),
        link=None if link is None else _link(link),
    )


def _client_compute(row: Mapping[str, Any]) -> ClientCompute:
    return ClientCompute(
        measured=bool(row["measured"]),
        before={str(name): _line(line) for name, line in row["before"].items()},
        begin=_line(row["begin"]),
        head=_line(row["head"]),
        end=_line(row["end"]),
        optimizer=_number(row, "optimizer"),
    )


def _link(row: Mapping[str, Any]) -> LinkSpeed:
    rest = (_number(row, name) for name in ("overhead", "worker_byte", "worker_request"))
    return LinkSpeed(_number(row, "rate", least=1.0), *rest)


def _product(row: Mapping[str, Any]) -> ProductSpeed:
    direction = row["direction"]
    if direction not in DIRECTIONS:
        raise ValueError(f"a product of direction {direction!r}")
    sizes = [_number(row, name, least=1.0) for name in ("tokens", "in_features", "out_features")]
    if any(size != int(size) for size in sizes):
        raise ValueError("a product's size is no whole number")
    return ProductSpeed(direction, *(int(size) for size in sizes), *(_number(row, p) for p in _PHASES))


def _line(row: Mapping[str, Any]) -> Line:
    return Line(_number(row, "fixed"), _number(row, "per_token"))


def _number(row: Mapping[str, Any], name: str, least: float = 0.0) -> float:
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < math.inf:
        raise ValueError(f"{name} is {value!r}, not a number of {least:g} or more")
    return float(value)


def check_backend(client: Speeds | None, worker: Speeds | None, to: str) -> None:
    """Refuse speeds of another backend or of other options. Raises ``ConfigError``.

    Args:
        client: speeds of the client, where they were given.
        worker: the same of workers.
        to: the backend and its options that are planned with.
    """
    for name, one in (("client", client), ("worker", worker)):
        if one is not None and one.to != to:
            raise ConfigError(
                f"the {name}'s speeds was measured with {one.to}, and this plan is for {to}: "
                f"measure again with --to {to}"
            )
