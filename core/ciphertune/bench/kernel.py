"""Benchmark of one product, encrypted and in the clear, in turn."""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import torch

from ciphertune.bench.plaintext import has_bfloat16, kernel_of
from ciphertune.client.choice import choose
from ciphertune.client.session import Session
from ciphertune.errors import ConfigError
from ciphertune.weights import describe, quantize
from ciphertune.worker import WeightStore, Worker


def bench_kernel(
    to: str, tokens: int, in_features: int, out_features: int, repeat: int = 7, seed: int = 0
) -> dict[str, Any]:
    """Time and error of ``y = x Wᵀ`` under a selection, the plaintext product between rounds.

    x and W are standard normal. Times are medians over ``repeat`` rounds after one that is not counted.
    ``relative_rms_error`` is against the float32 weight, ``relative_rms_error_quantized_weight`` against the weight
    that the worker really holds, both computed in float64.

    Args:
        to: selection string of a transport that stays in this process.
        tokens: T, rows of x.
        in_features: K, columns of W.
        out_features: N, rows of W.
        repeat: rounds.
        seed: of x and W.

    Returns:
        Seconds (``…_s``), bytes, errors and ratios by name.

    Raises:
        ConfigError: a size that is not positive, or a remote transport, whose worker has its own weights.
    """
    for name, value in (
        ("tokens", tokens),
        ("in-features", in_features),
        ("out-features", out_features),
        ("repeat", repeat),
    ):
        if value < 1:
            raise ConfigError(f"{name} must be 1 or more, not {value}")
    choice = choose(to)
    if choice.transport.remote:
        raise ConfigError(f"the kernel benchmark makes its own weight, so it cannot use the workers behind {to!r}")
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator)
    x = torch.randn(tokens, in_features, generator=generator)
    held = quantize(weight, choice.backend.weight_bits)
    info = describe("layer", held)
    device = torch.device("cpu")
    session = Session(choice, [info], [(0,)], Worker(WeightStore.of({"layer": held}), device), device)
    plain: list[float] = []
    half: list[float] = []
    halves = (weight.bfloat16(), x.bfloat16()) if has_bfloat16() else None
    rounds = []
    y = torch.empty(0)
    for index in range(repeat + 1):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        seconds = time.perf_counter() - start
        if halves is not None:
            start = time.perf_counter()
            torch.nn.functional.linear(halves[1], halves[0])
            half += [time.perf_counter() - start] if index > 0 else []
        before = copy.copy(session.traffic)
        y = session.product(0, "forward", x)
        if index > 0:
            plain.append(seconds)
            rounds.append(session.traffic.since(before))
    y = y if info.scale is None else y * info.scale
    exact = x.double() @ weight.double().t()
    exact_held = x.double() @ held.dequantize().double().t()
    session.close()
    plaintext = statistics.median(plain)
    encrypt, evaluate, decrypt = (
        statistics.median(getattr(r, f"{phase}_seconds") for r in rounds)
        for phase in ("encrypt", "evaluate", "decrypt")
    )
    last = rounds[-1]
    return {
        "to": str(choice.selection),
        "tokens": tokens,
        "in_features": in_features,
        "out_features": out_features,
        "plaintext_fp32_s": plaintext,
        "plaintext_bf16_s": statistics.median(half) if half else None,
        "kernel": kernel_of(choice.backend),
        "encrypt_s": encrypt,
        "evaluate_s": evaluate,
        "decrypt_s": decrypt,
        "evaluate_ratio": evaluate / plaintext,
        "total_ratio": (encrypt + evaluate + decrypt) / plaintext,
        "bytes_up": last.bytes_up,
        "bytes_down": last.bytes_down,
        "bytes_up_per_value": last.bytes_up / (tokens * in_features),
        "bytes_down_per_value": last.bytes_down / (tokens * out_features),
        "relative_rms_error": _relative(y, exact),
        "relative_rms_error_quantized_weight": _relative(y, exact_held),
        "security_bits": choice.backend.security.bits,
        "security_level": choice.backend.security.level,
        "repeat": repeat,
        "threads": torch.get_num_threads(),
    }


def _relative(y: torch.Tensor, exact: torch.Tensor) -> float:
    return float((y.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())
