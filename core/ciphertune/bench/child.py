"""Training steps in a process of its own, so that its peak memory is its own: ``python -m ciphertune.bench.child``."""

from __future__ import annotations

import copy
import dataclasses
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ciphertune.convert import outsource, session_of
from ciphertune.workloads import load_workload


def steps(model_name: str, to: str | None, tokens: int, count: int, seed: int) -> dict[str, Any]:
    """Train for ``count`` optimizer steps, in the clear where ``to`` is None.

    Returns:
        ``seconds`` and ``losses`` by step, ``peak_rss_mb`` of this process, and where products were outsourced the
        ``traffic`` by step.
    """
    work = load_workload(model_name, batches=count, tokens=tokens, held_out=1, seed=seed)
    model = work.model if to is None else outsource(work.model, to)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=work.learning_rate)
    session = None if to is None else session_of(model)
    seconds, losses, traffic = [], [], []
    for batch in work.train:
        before = None if session is None else copy.copy(session.traffic)
        start = time.perf_counter()
        loss = model(**batch).loss if work.loss_fn is None else work.loss_fn(model(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        losses.append(float(loss.detach()))
        if session is not None and before is not None:
            traffic.append(dataclasses.asdict(session.traffic.since(before)))
    result: dict[str, Any] = {"seconds": seconds, "losses": losses, "peak_rss_mb": _peak_mb(), "traffic": traffic}
    if session is not None:
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
