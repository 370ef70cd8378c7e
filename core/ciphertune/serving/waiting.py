"""Answers that wait to be computed, taken in turns of their callers."""

from __future__ import annotations

import collections
from collections.abc import Sequence

from ciphertune.serving.answers import Answer
from ciphertune.serving.request_error import busy


class WaitingAnswers:
    """Answers that wait, a queue for each caller; whoever was served least lately goes next. Not locked.

    Args:
        most: of one caller.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._queues: collections.OrderedDict[str, collections.deque[Answer]] = collections.OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def add(self, answers: Sequence[Answer]) -> None:
        """Let the answers of one request wait. Raises ``RequestError`` where too many of its caller do."""
        queue = self._queues.setdefault(answers[0].caller, collections.deque())
        if len(queue) + len(answers) > self._most:
            # Those whose caller has gone wait no more.
            kept = [answer for answer in queue if not answer.cancelled]
            queue.clear()
            queue.extend(kept)
        if len(queue) + len(answers) > self._most:
            raise busy(len(queue))
        queue.extend(answers)

    def take(self, count: int, caller: str | None = None) -> list[Answer]:
        """At most ``count`` answers, one of each caller in turn.

        Args:
            count: at most.
            caller: whose alone; of anyone if None.
        """
        found: list[Answer] = []
        while len(found) < count:
            name = next((each for each, queue in self._queues.items() if queue and caller in (None, each)), None)
            if name is None:
                break
            answer = self._queues[name].popleft()
            if answer.cancelled:
                continue
            found.append(answer)
            self._queues.move_to_end(name)
        return found

    def whose_turn(self) -> str | None:
        """The caller who goes next, if anyone waits."""
        return next((each for each, queue in self._queues.items() if any(not a.cancelled for a in queue)), None)
