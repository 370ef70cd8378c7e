"""The figures in docs/performance.md and the README: ``make bench`` prints the table, ``--json FILE`` also keeps them.

``python docs/generate.py`` writes those of ``results.json`` into the pages.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

from ciphertune.bench.compare import machine
from ciphertune.bench.kernel import bench_kernel
from ciphertune.bench.train import bench_train
from ciphertune.planning.plan import make_plan


def measure(repeat: int) -> dict[str, Any]:
    where = {**machine(), "load_before": round(os.getloadavg()[0], 1)}
    kernels = {
        "2048³": bench_kernel("mlwe", 2048, 2048, 2048, repeat),
        "2048³, 32-bit requests": bench_kernel("mlwe?request_bits=32", 2048, 2048, 2048, repeat),
        "K = 768": bench_kernel("mlwe", 2048, 768, 768, repeat),
        "K = 8192": bench_kernel("mlwe", 512, 8192, 1024, repeat),
    }
    step, short = (bench_train("smollm2", "mlwe", tokens, steps) for tokens, steps in ((1024, 5), (256, 9)))
    return {"machine": where, "kernels": kernels, "step": step, "short_step": short}


def rows(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    k, step, short = found["kernels"], found["step"], found["short_step"]
    cube, wide = k["2048³"], k["2048³, 32-bit requests"]
    errors = [math.log2(k[name]["relative_rms_error_quantized_weight"]) for name in ("K = 768", "K = 8192")]
    return [
        ("evaluate / plaintext float32, T = K = N = 2048", f"{cube['evaluate_ratio']:.2f}", "≤ 1.8"),
        ("encrypt + evaluate + decrypt / plaintext, same shape", f"{cube['total_ratio']:.2f}", "≤ 3.5"),
        ("the same with 32-bit requests", f"{wide['evaluate_ratio']:.2f} and {wide['total_ratio']:.2f}", ""),
        (
            "relative error against the int8 weight, K = 768 / K = 8192",
            f"2^{errors[0]:.1f} / 2^{errors[1]:.1f}",
            "≤ 2^-9 / 2^-11",
        ),
        (
            "bytes a value, up / down",
            f"{cube['bytes_up_per_value']:.2f} / {cube['bytes_down_per_value']:.2f}",
            "≤ 3 / 3",
        ),
        (
            "SmolLM2 step of 1,024 tokens, encrypted / plaintext",
            f"{step['ratio']:.2f} ({step['encrypted_step_s']:.1f} s / {step['plaintext_step_s']:.1f} s)",
            "≤ 1.9",
        ),
        (
            "the same step over plaintext in bfloat16",
            f"{step['encrypted_step_s'] / step['plaintext_bf16_step_s']:.2f} "
            f"({step['encrypted_step_s']:.1f} s / {step['plaintext_bf16_step_s']:.1f} s)",
            "",
        ),
        ("peak memory of that step over plaintext's", f"{step['memory_ratio']:.2f}", "≤ 1.5"),
        (
            "traffic of that step, up / down",
            f"{step['bytes_up'] / 1e9:.2f} GB / {step['bytes_down'] / 1e9:.2f} GB",
            "≤ 0.79 / 0.79",
        ),
        (
            "SmolLM2 step of 256 tokens, encrypted / plaintext",
            f"{short['ratio']:.2f} ({short['encrypted_step_s']:.1f} s / {short['plaintext_step_s']:.1f} s)",
            "≤ 2.2",
        ),
    ]


def traffic() -> tuple[str, str]:
    """Bytes of the step, up and down: what a session counts does not vary, and plans are exact."""
    plan = make_plan("smollm2", "mlwe", tokens=1024, measure=False)
    return f"{plan.bytes_up / 1e6:.0f} MB", f"{plan.bytes_down / 1e6:.0f} MB"


def summary(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The few that the README shows."""
    cube, step = found["kernels"]["2048³"], found["step"]
    error = math.log2(cube["relative_rms_error_quantized_weight"])
    return [
        (
            "one product of 2048 × 2048 × 2048: evaluate / all of it",
            _beside(
                f"{cube['evaluate_ratio']:.1f}× / {cube['total_ratio']:.1f}×",
                "{:.1f}× / {:.1f}×".format(
                    *(each * cube["plaintext_fp32_s"] / cube["plaintext_bf16_s"] for each in _ratios(cube))
                ),
            ),
        ),
        ("its error against the weight the worker holds", f"2^{error:.1f} of the signal"),
        (
            "SmolLM2-135M training step of 1,024 tokens",
            _beside(f"{step['ratio']:.1f}×", f"{step['encrypted_step_s'] / step['plaintext_bf16_step_s']:.1f}×"),
        ),
        ("peak memory of that step", f"{step['memory_ratio']:.2f}×"),
        ("traffic of that step, exact", "{} up, {} down".format(*traffic())),
    ]


def _ratios(kernel: dict[str, Any]) -> tuple[float, float]:
    return kernel["evaluate_ratio"], kernel["total_ratio"]


def _beside(float32: str, bfloat16: str) -> str:
    return f"{float32} of plaintext in float32, {bfloat16} in bfloat16"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=11)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = measure(arguments.repeat)
    print("| what | measured | to reach |\n| --- | --- | --- |")
    for row in rows(found):
        print(f"| {' | '.join(row)} |")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
