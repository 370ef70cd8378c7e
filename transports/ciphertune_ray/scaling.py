"""How many workers a deployment should have, by the requests that wait at those it has. Knows no Ray and no clock."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ciphertune.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Scale:
    """When workers are added and ended.

    Attributes:
        least, most: workers.
        queue: requests that wait, of a worker on average, above which there are too few.
        busy_seconds: how long there have to be too few before some are added.
        idle_seconds: how long nothing has to wait, and fewer to be enough, before some end.
        step: workers that are added or ended at a time: one for each part of the model.
    """

    least: int
    most: int
    queue: float = 2.0
    busy_seconds: float = 15.0
    idle_seconds: float = 300.0
    step: int = 1

    def __post_init__(self) -> None:
        if self.most < self.least:
            raise ConfigError(f"{self.most} workers at most are fewer than {self.least} at least")
        if self.least < self.step:
            raise ConfigError(f"{self.least} workers cannot hold the {self.step} parts of the model")


class Scaler:
    """Looks at workers' loads, and says how many there should be.

    Args:
        scale: when workers are added and ended.
    """

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self._busy_since: float | None = None
        self._idle_since: float | None = None

    def wanted(self, workers: Sequence[Mapping[str, Any]], now: float) -> int:
        """The number of workers that there should be.

        Args:
            workers: as ``ciphertune_ray.deployment.describe`` tells of them, those that do not answer included.
            now: in seconds, on any clock.
        """
        scale, count = self.scale, len(workers)
        loads = [(int(worker["queued"]), int(worker["under_way"])) for worker in workers if "queued" in worker]
        queued, under_way = (sum(each) for each in zip(*loads, strict=True)) if loads else (0, 0)
        # Workers that start, or start again, will take their part soon.
        waiting = loads and len(loads) == count
        busy = waiting and queued > scale.queue * count
        idle = waiting and queued == 0 and under_way <= max(0, count - scale.step)
        self._busy_since = (self._busy_since if self._busy_since is not None else now) if busy else None
        self._idle_since = (self._idle_since if self._idle_since is not None else now) if idle else None
        if count < scale.least:
            return scale.least
        if self._busy_since is not None and now - self._busy_since >= scale.busy_seconds:
            self._busy_since = None
            count += scale.step
        elif self._idle_since is not None and now - self._idle_since >= scale.idle_seconds:
            self._idle_since = None
            count -= scale.step
        return max(scale.least, min(count, scale.most))
