"""A whole training step, encrypted and in the clear."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from ciphertune.bench.plaintext import has_bfloat16
from ciphertune.errors import CipherTuneError, ConfigError
from ciphertune.workloads.local_worker import serving


def bench_train(
    model: str,
    to: str,
    tokens: int,
    steps: int = 4,
    repeat: int = 1,
    seed: int = 0,
    against: str | None = None,
    micro_batches: int = 1,
    interleave: int = 1,
) -> dict[str, Any]:
    """Time, memory and loss of training steps, each mode in child processes of its own, in turn.

    One process for both would show the larger of two peaks and keep one model's pages while the other runs. The
    first step of every process warms up and is not timed; a step's time, and that of each of its phases, is the median
    over the others. Bytes are those of the last step. The set-up is that of the first encrypted process, which
    finds nothing on disk of earlier sessions; later processes find what it made.

    Args:
        model: a workload: ``smollm2`` or ``mlp``, a known shape with random weights, or a folder.
        to: selection string. A remote transport without endpoints, ``mlwe+zmq://``, gets a worker process of its own on
            this machine.
        tokens: tokens or samples a step.
        steps: optimizer steps a process, 2 or more.
        repeat: processes of each mode.
        seed: of adapters and data, the same for all modes.
        against: another selection string to compare with in the same run.
        micro_batches: parts that a step's batch is computed in where it is encrypted; in the clear it stays whole.
        interleave: how many of them are under way at once.

    Raises:
        ConfigError: fewer than two steps, no token or process, or more to interleave than there are micro-batches.
        CipherTuneError: a child process failed, which is also how a missing package shows.
    """
    if steps < 2:
        raise ConfigError(f"steps must be 2 or more, not {steps}: the first one warms up")
    counts = {"tokens": tokens, "repeat": repeat, "micro_batches": micro_batches, "interleave": interleave}
    for name, value in counts.items():
        if value < 1:
            raise ConfigError(f"{name} must be 1 or more, not {value}")
    if interleave > micro_batches:
        raise ConfigError(
            f"interleave must be from 1 to the number of micro-batches, {micro_batches}, not {interleave}"
        )
    request = {"model_name": model, "tokens": tokens, "count": steps, "seed": seed}
    parts = {"micro_batches": micro_batches, "interleave": interleave}
    plain, encrypted, other, half = [], [], [], []
    with (
        tempfile.TemporaryDirectory(prefix="ciphertune-bench-") as cache,
        serving(model, to) as served,
        serving(model, against or "mlwe") as other_served,
    ):
        for _ in range(repeat):
            encrypted.append(run_child({**request, **parts, "to": served}, cache))
            plain.append(run_child({**request, "to": None}, cache))
            if has_bfloat16():
                half.append(run_child({**request, "to": None, "bfloat16": True}, cache))
            if against is not None:
                other.append(run_child({**request, **parts, "to": other_served}, cache))
    plain_step, encrypted_step = _step(plain), _step(encrypted)
    plain_peak, encrypted_peak = (max(run["peak_rss_mb"] for run in runs) for runs in (plain, encrypted))
    traffic = encrypted[-1]["traffic"][-1]
    encrypt, evaluate, decrypt = (
        statistics.median(step[f"{phase}_seconds"] for run in encrypted for step in run["traffic"][1:])
        for phase in ("encrypt", "evaluate", "decrypt")
    )
    return {
        "model": model,
        "to": to,
        "tokens": tokens,
        "steps": steps,
        **parts,
        "plaintext_step_s": plain_step,
        "plaintext_bf16_step_s": _step(half) if half else None,
        "encrypted_step_s": encrypted_step,
        "ratio": encrypted_step / plain_step,
        "against": against,
        "against_step_s": _step(other) if other else None,
        "against_ratio": encrypted_step / _step(other) if other else None,
        "peak_rss_mb": encrypted_peak,
        "plaintext_peak_rss_mb": plain_peak,
        "memory_ratio": encrypted_peak / plain_peak,
        "bytes_up": traffic["bytes_up"],
        "bytes_down": traffic["bytes_down"],
        "requests": traffic["requests"],
        "set_up": encrypted[0]["set_up"],
        "kernel": encrypted[0]["kernel"],
        "encrypt_s": encrypt,
        "evaluate_s": evaluate,
        "decrypt_s": decrypt,
        "loss_plaintext": plain[-1]["losses"],
        "loss_encrypted": encrypted[-1]["losses"],
    }


def _step(runs: list[dict[str, Any]]) -> float:
    return float(statistics.median(s for run in runs for s in run["seconds"][1:]))


def run_child(request: dict[str, Any], cache: str) -> dict[str, Any]:
    """Run training steps in a process of its own.

    Args:
        request: arguments of ``ciphertune.bench.child.steps``.
        cache: folder for what the process keeps on disk.

    Returns:
        What that function returns.

    Raises:
        CipherTuneError: the process failed; the message has its last line.
    """
    command = [sys.executable, "-m", "ciphertune.bench.child", json.dumps(request)]
    environment = {**os.environ, "CIPHERTUNE_CACHE": cache}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if run.returncode:
        last = run.stderr.strip().splitlines()[-1:] or ["no output"]
        raise CipherTuneError(f"the benchmark's process ended with status {run.returncode}: {last[0]}")
    result: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
    return result
