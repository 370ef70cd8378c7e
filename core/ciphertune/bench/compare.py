"""Every installed backend on the same product: what each phase takes, what travels, and how wrong the result is.

Each backend runs in a process of its own with a fresh folder for keys, so that one that needs long, much memory or a
package that is not there is a row like any other. ``python -m ciphertune.bench.compare REQUEST`` is that process.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ciphertune.backend import DIRECTIONS, Backend, LinearMap
from ciphertune.client.choice import choose
from ciphertune.client.preparing import HeldCodes, prepare
from ciphertune.errors import CipherTuneError, ConfigError, LayerError, NotPreparedError, PrecisionError
from ciphertune.plugins import registry
from ciphertune.weights import describe, group_map, quantize

_PHASES = ("encrypt", "evaluate", "decrypt")
_SLOW_SECONDS = 5.0
"""A round that takes longer is not repeated."""
_START_SECONDS = 300.0
"""For a process to import, make keys and prepare, beside the time it may evaluate."""


@dataclasses.dataclass(frozen=True)
class Product:
    """The size of a product ``x Wᵀ``: x of shape (tokens, in_features), W of shape (out_features, in_features)."""

    tokens: int
    in_features: int
    out_features: int

    def __str__(self) -> str:
        return f"{self.tokens} × {self.in_features} × {self.out_features}"


SMALL = (Product(4, 64, 64), Product(4, 16, 16), Product(1, 8, 8))
"""Products measured with every backend: the first, or the next that it can evaluate in time."""
LARGE = Product(64, 768, 768)
"""The size of one layer of a small language model for half a sentence."""


def bench_compare(
    selections: Sequence[str] | None = None,
    large: Product = LARGE,
    repeat: int = 3,
    seconds: float = 60.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure backends on one small product, and on a large one where they can evaluate it in time.

    Where they cannot, the figures of the large product are the small one's times what ``Backend.work`` says that the
    phases grow by, and marked as ``scaled``. Errors are never scaled. x and W are standard normal.

    Args:
        selections: selection strings without a transport; every installed backend if not given.
        large: the large product.
        repeat: rounds after one that is not counted; medians are given.
        seconds: that a product may be expected to take.
        seed: of x and W.

    Returns:
        ``machine``, ``large`` and ``rows``. A row has ``to``, ``encrypted``, ``security_bits``,
        ``security_level``, ``scaling``, and the figures ``small`` and ``large``; or, where the backend cannot run,
        ``to`` and ``reason``.

    Raises:
        ConfigError: a size, repeat or time that is not positive.
        SelectionError: a selection that is none.
    """
    for name, value in (*dataclasses.asdict(large).items(), ("repeat", repeat), ("seconds", seconds)):
        if not value > 0:
            raise ConfigError(f"{name} must be more than 0, not {value}")
    names = list(selections) if selections is not None else sorted(registry.installed(registry.BACKENDS))
    return {
        "machine": machine(),
        "large": str(large),
        "rows": [_row(to, large, repeat, seconds, seed) for to in names],
    }


def machine() -> dict[str, Any]:
    """Machine that the figures are of, in words."""
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "processor": processor,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.cuda.is_available(),
    }


def measure(to: str, product: Product, large: Product, repeat: int, seed: int) -> dict[str, Any]:
    """Measure one backend on one product, in this process.

    Returns:
        Seconds by phase (medians), bytes, errors, what is known of security, and how often the small product's work
        the large one's is, by phase.

    Raises:
        CipherTuneError: the backend cannot run, or not with this product.
    """
    backend = choose(to).backend
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(product.out_features, product.in_features, generator=generator)
    x = torch.randn(product.tokens, product.in_features, generator=generator)
    held = quantize(values, backend.weight_bits)
    layers = [describe("layer", held)]
    maps = {direction: group_map(layers, direction) for direction in DIRECTIONS}
    linear_map = maps["forward"]
    backend.refuse_imprecise(linear_map)
    device, clock = torch.device("cpu"), time.perf_counter
    start = clock()
    client = backend.client(device)
    groups, codes = [(layers, maps, ())], HeldCodes({"layer": held.codes})
    prepare([client], groups, codes)
    keygen = clock() - start
    key = client.evaluation_key()
    start = clock()
    worker = type(backend).worker(dict(client.open_fields()), key, device)
    prepared = worker.prepare(held.codes)
    opened = clock() - start
    rounds: list[tuple[float, ...]] = []
    while len(rounds) <= repeat:
        begun = clock()
        torch.nn.functional.linear(x, values)
        plain = clock() - begun
        marks = [clock()]
        try:
            encrypted = client.encrypt(x, linear_map)
        except NotPreparedError:
            prepare([client], groups, codes)
            marks = [clock()]
            encrypted = client.encrypt(x, linear_map)
        marks.append(clock())
        reply = worker.evaluate(prepared, "forward", encrypted.buffers)
        marks.append(clock())
        y = client.decrypt(reply, encrypted.state, linear_map)
        marks.append(clock())
        rounds.append((plain, *(after - before for before, after in itertools.pairwise(marks))))
        if marks[-1] - marks[0] > _SLOW_SECONDS:
            break
    client.close()
    worker.close()
    counted = rounds[1:] or rounds
    plaintext, *phases = (statistics.median(column) for column in zip(*counted, strict=True))
    exact_held = x.double() @ held.codes.double().t()
    scale = torch.ones(product.out_features) if held.scale is None else held.scale
    exact = x.double() @ values.double().t()
    return {
        "product": str(product),
        "plaintext_fp32_s": plaintext,
        "keygen_s": keygen,
        "open_s": opened,
        **{f"{name}_s": seconds for name, seconds in zip(_PHASES, phases, strict=True)},
        "bytes_up": sum(t.nbytes for t in encrypted.buffers.values()),
        "bytes_down": sum(t.nbytes for t in reply.values()),
        "key_bytes": sum(t.nbytes for t in key.values()),
        "relative_rms_error": _relative(y.double() * scale.double(), exact),
        "relative_rms_error_quantized_weight": _relative(y.double(), exact_held),
        "rounds": len(counted),
        "growth": _growth(backend, product, large),
        "encrypted": backend.security.encrypted,
        "security_bits": backend.security.bits,
        "security_level": backend.security.level,
    }


def _growth(backend: Backend, product: Product, large: Product) -> dict[str, Any]:
    small_map, large_map = (
        LinearMap("", "forward", p.in_features, p.out_features, 127 * math.sqrt(p.in_features))
        for p in (product, large)
    )
    small_work, large_work = backend.work(small_map, product.tokens), backend.work(large_map, large.tokens)
    small_bytes, large_bytes = backend.traffic(small_map, product.tokens), backend.traffic(large_map, large.tokens)
    values = (
        large.tokens * large.in_features / (product.tokens * product.in_features),
        large.tokens * large.out_features / (product.tokens * product.out_features),
    )
    known = small_bytes is not None and large_bytes is not None
    ways = [b / a for a, b in zip(small_bytes, large_bytes, strict=True)] if known else values  # type: ignore[arg-type]
    return {
        **{f"{name}_s": getattr(large_work, name) / getattr(small_work, name) for name in _PHASES},
        "bytes_up": ways[0],
        "bytes_down": ways[1],
        "by": small_work.by,
    }


def _row(to: str, large: Product, repeat: int, seconds: float, seed: int) -> dict[str, Any]:
    choose(to)
    reason = ""
    with tempfile.TemporaryDirectory() as keys:
        for product in SMALL:
            small = _child(to, product, large, repeat, seed, keys, seconds)
            if "reason" not in small:
                break
            reason = reason or f"{product}: {small['reason']}"
            if not small["smaller"]:
                return {"to": to, "reason": small["reason"]}
        else:
            return {"to": to, "reason": reason}
        growth = small.pop("growth")
        expected = sum(small[f"{name}_s"] * growth[f"{name}_s"] for name in _PHASES)
        whole: dict[str, Any] = {"reason": ""}
        if expected <= seconds:
            whole = _child(to, large, large, repeat, seed, keys, seconds)
    shared: dict[str, Any] = {name: small.pop(name) for name in ("encrypted", "security_bits", "security_level")}
    if "reason" in whole:
        reason = reason or whole["reason"]
        figures = {name: small[name] * factor for name, factor in growth.items() if name != "by"}
        whole = {"product": str(large), "scaled": True, **figures}
    else:
        whole["scaled"] = False
        for known in ("growth", *shared):
            del whole[known]
    return {"to": to, **shared, "scaling": growth["by"], "limit": reason or None, "small": small, "large": whole}


def _child(
    to: str, product: Product, large: Product, repeat: int, seed: int, keys: str, seconds: float
) -> dict[str, Any]:
    """``measure`` in a process of its own, or a ``reason`` and whether something ``smaller`` may do."""
    request = {"to": to, "product": dataclasses.astuple(product), "large": dataclasses.astuple(large)}
    command = [
        sys.executable,
        "-m",
        "ciphertune.bench.compare",
        json.dumps({**request, "repeat": repeat, "seed": seed}),
    ]
    limit = _START_SECONDS + (repeat + 1) * seconds
    try:
        run = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=limit,
            env={**os.environ, "CIPHERTUNE_KEYS": keys},
        )
    except subprocess.TimeoutExpired:
        return {"reason": f"not done after {limit:.0f} s", "smaller": True}
    if run.returncode:
        last = run.stderr.strip().splitlines()[-1:] or ["no output"]
        return {"reason": f"its process ended with status {run.returncode}: {last[0]}", "smaller": False}
    result: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
    return result


def _relative(y: torch.Tensor, exact: torch.Tensor) -> float:
    return float((y - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def _main(text: str) -> None:
    request = json.loads(text)
    sizes = (Product(*request["product"]), Product(*request["large"]))
    try:
        result = measure(request["to"], *sizes, request["repeat"], request["seed"])
    except CipherTuneError as error:
        result = {"reason": str(error), "smaller": isinstance(error, (PrecisionError, LayerError))}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    _main(sys.argv[1])
