"""A schedule that goes on for another number of steps than it was begun with."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ciphertune._support.torch_compat import scheduler_state


class ScheduleError(Exception):
    """A schedule cannot go on; the text says why."""


def continued(
    scheduler: LRScheduler,
    optimizer: Optimizer,
    rates: Sequence[float],
    stored: Mapping[str, Any],
    following: Sequence[float],
    total: int,
) -> dict[str, Any]:
    """The state that a scheduler has after some steps, where the learning rates so far would have been the same.

    A copy of optimizer and scheduler takes all steps of the run: neither of them is changed.

    Args:
        scheduler: fresh, or one that went on since.
        optimizer: that it belongs to.
        rates: of the first parameter group, of the steps that were done.
        stored: state of the scheduler then.
        following: learning rates of all parameter groups after them.
        total: steps of the whole run.

    Raises:
        ScheduleError: the rates would have been others, or there are none for the steps to come.
    """
    with warnings.catch_warnings():
        # The copied optimizer takes no step.
        warnings.simplefilter("ignore")
        tried, own = copy.deepcopy((optimizer, scheduler))
        if own.last_epoch == 0:
            for done, rate in enumerate(rates):
                _hold(tried.param_groups[0]["lr"], rate, done + 1)
                own.step()
            for group, rate in zip(tried.param_groups, following, strict=True):
                _hold(group["lr"], rate, len(rates) + 1)
        else:
            own.load_state_dict(dict(stored))
            for group, rate in zip(tried.param_groups, following, strict=True):
                group["lr"] = rate
        state = copy.deepcopy(scheduler_state(own))
        largest = 0.0
        for step in range(len(rates), total):
            largest = max(largest, *(abs(float(group["lr"])) for group in tried.param_groups))
            try:
                own.step()
            except ValueError as error:
                raise ScheduleError(f"it ends at step {step + 1}: {error}") from error
    if largest == 0.0 and len(rates) < total:
        raise ScheduleError(f"its learning rate is 0 from step {len(rates) + 1} on")
    return state


def _hold(rate: Any, expected: float, step: int) -> None:
    if not math.isclose(float(rate), expected, rel_tol=1e-9, abs_tol=1e-30):
        raise ScheduleError(f"step {step} had the learning rate {expected:.6g}, and would have had {float(rate):.6g}")
