"""``ciphertune worker`` on a machine as slow as one likes: ``python slow_worker.py SHARE FOLDER …``.

After each evaluation it waits until the processor's seconds that this took, over the share, have passed. So the same
product takes the same time whatever came before it. A quota of the scheduler's does not give that: who was idle has
its share of the next milliseconds saved, and a short product runs at full speed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ciphertune.cli import cli
from ciphertune.protocol import Message
from ciphertune.runs import worker
from ciphertune.worker.worker import Worker


@contextmanager
def slowed(share: float) -> Iterator[Callable[[], float]]:
    """Wait in the end for what a slower processor would have taken longer; gives the seconds of all of it."""
    begun, computed, took = time.perf_counter(), time.thread_time(), 0.0
    yield lambda: took
    least = (time.thread_time() - computed) / share
    time.sleep(max(0.0, begun + least - time.perf_counter()))
    took = time.perf_counter() - begun


class SlowWorker(Worker):
    """A worker with a share of a processor."""

    share = 1.0

    def handle(self, request: Message, *rest: Any, **named: Any) -> Message:
        if request.kind != "evaluate":
            return super().handle(request, *rest, **named)
        with slowed(self.share) as took:
            reply = super().handle(request, *rest, **named)
        if reply.kind == "ok":
            reply.fields["seconds"] = took()
        return reply

    def handle_together(self, requests: Sequence[tuple[Message, str]]) -> list[Message]:
        with slowed(self.share):
            return super().handle_together(requests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("share", type=float, help="of a processor, above 0 and up to 1")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of ciphertune worker")
    arguments = parser.parse_args()
    SlowWorker.share = arguments.share
    worker.Worker = SlowWorker  # type: ignore[misc]
    cli(["worker", *arguments.arguments])


if __name__ == "__main__":
    main()
