"""Training steps in a process of its own, so that its peak memory is its own: ``python -m ciphertune.bench.child``."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ciphertune.bench.batches import cut_batch
from ciphertune.bench.plaintext import kernel_of
from ciphertune.interleaving.interleaver import Interleaver
from ciphertune.outsourcing.convert import outsource, session_of
from ciphertune.workloads.named import load_workload


def steps(
    model_name: str,
    to: str | None,
    tokens: int,
    count: int,
    seed: int,
    micro_batches: int = 1,
    interleave: int = 1,
    bfloat16: bool = False,
) -> dict[str, Any]:
    """Train for ``count`` optimizer steps, in the clear where ``to`` is None.

    Args:
        model_name: of a workload.
        to: selection string, or None.
        tokens: tokens or samples a step.
        count: steps.
        seed: of adapters and data.
        micro_batches: parts of equally many sequences or samples that a step's batch is computed in.
        interleave: how many of them are under way at once.
        bfloat16: compute in bfloat16 instead of float32; in the clear only.

    Raises:
        ConfigError: a batch cannot be cut into so many equal parts.

    Returns:
        ``seconds`` and ``losses`` by step, ``peak_rss_mb`` of this process, and where products were outsourced the
        ``traffic`` by step, the costs of ``set_up``, and the ``kernel`` that multiplied, None where a worker elsewhere
        did or it has no name.
    """
    work = load_workload(model_name, batches=count, tokens=tokens, held_out=1, seed=seed)
    model = work.model if to is None else outsource(work.model, to)
    if bfloat16:
        model = model.to(torch.bfloat16)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=work.learning_rate)
    session = None if to is None else session_of(model)
    seconds, losses, traffic = [], [], []

    def part_of_step(part: Any) -> float:
        if work.loss_fn is None:
            loss = model(**part).loss
        else:
            loss = work.loss_fn(model(part[0].bfloat16() if bfloat16 else part[0]), part[1])
        (loss / micro_batches).backward()
        return float(loss.detach()) / micro_batches

    interleaver = Interleaver(interleave)
    for batch in work.train:
        parts = cut_batch(batch, micro_batches)
        before = None if session is None else copy.copy(session.traffic)
        start = time.perf_counter()
        loss = sum(interleaver.run([functools.partial(part_of_step, part) for part in parts]))
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        losses.append(loss)
        if session is not None and before is not None:
            traffic.append(dataclasses.asdict(session.traffic.since(before)))
    interleaver.close()
    result: dict[str, Any] = {"seconds": seconds, "losses": losses, "peak_rss_mb": _peak_mb(), "traffic": traffic}
    if session is not None:
        result["kernel"] = None if session.choice.transport.remote else kernel_of(session.choice.backend)
        result["set_up"] = dataclasses.asdict(session.set_up)
        session.close()
    return result


def _peak_mb() -> float:
    """Peak resident memory of this program, in 10^6 bytes."""
    # Linux carries ru_maxrss over from the process that started this one; VmHWM belongs to this program alone.
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e6
    except (OSError, StopIteration):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    sys.stdout.write(json.dumps(steps(**request)) + "\n")
