"""The round trip of a request that carries and asks for nothing: what a transport itself costs."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from ciphertune.client.choice import choose
from ciphertune.client.connecting import connect
from ciphertune.errors import ConfigError
from ciphertune.protocol import Message
from ciphertune.workloads.local_worker import serving


def bench_link(to: str, count: int = 2000) -> dict[str, Any]:
    """Median and 99th percentile of the time from sending an empty request to its reply, in seconds.

    Args:
        to: selection string of a remote transport; without endpoints, a worker is started for it.
        count: requests, one after the other, after a tenth as many that are not counted.

    Raises:
        ConfigError: a transport that stays in this process, or too few requests.
        TransportError: the worker does not answer.
    """
    if count < 100:
        raise ConfigError(f"count must be 100 or more, not {count}")
    if not choose(to).transport.remote:
        raise ConfigError(f"{to!r} stays in this process: there is no link to measure")
    with serving(torch.nn.Sequential(torch.nn.Linear(8, 8)), to) as served:
        choice = choose(served)
        link, *others = connect(choice, None)
        try:
            seconds = []
            for _ in range(count + count // 10):
                start = time.perf_counter()
                link.submit(Message("hello")).result(60)
                seconds.append(time.perf_counter() - start)
        finally:
            for opened in (link, *others):
                opened.close()
    counted = sorted(seconds[count // 10 :])
    return {
        "to": to,
        "requests": count,
        "median_s": statistics.median(counted),
        "p99_s": counted[int(0.99 * len(counted))],
    }
