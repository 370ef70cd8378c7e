"""Cooperative scheduling of tasks: while one waits for a worker's reply, the others compute.

One task computes at any time. It yields only where it waits for a reply, to the next in a fixed order (round robin),
and goes on when the reply is there and its turn has come again. What is computed, and in which order, therefore never
depends on timing.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Generic, TypeVar

from ciphertune._support.denormals import flush_here
from ciphertune.interleaving.rng_streams import RandomStreams
from ciphertune.interleaving.thread_state import ThreadState

ResultT = TypeVar("ResultT")

_here = threading.local()


def interleave(tasks: Iterable[Callable[[], ResultT]]) -> list[ResultT]:
    """Run tasks such that one computes while the others wait for workers.

    Each runs on a thread of its own, one at a time: it yields where it waits for the reply to a product, and goes on
    when its turn comes again, in the order of the tasks. Grad mode, inference mode, autocast, torch's modes and
    context variables are those of the caller. Each task draws from a random stream of its own (the first from the
    caller's), so that results repeat from the same seed.

    Gradients of a parameter add up in ``.grad`` in the order in which they are computed, the same in every run.
    On a GPU, backward passes do not yield, because all of them run on one thread of torch's.

    Args:
        tasks: functions without arguments; a forward and backward pass each, as a rule.

    Returns:
        Their results, in order.

    Raises:
        BaseException: what the first task to fail raised; the others end at their next or present wait, without a
            result. No thread is left.
    """
    functions = list(tasks)
    with Interleaver(max(1, len(functions))) as interleaver:
        return interleaver.run(functions)


def wait_for_reply(blocking: Callable[[], ResultT]) -> tuple[ResultT, float]:
    """Call a function that blocks; within a task, after the other tasks had their turns.

    Args:
        blocking: called on the thread that runs the tasks, the only one that can be interrupted.

    Returns:
        Its result, and the seconds that other tasks computed before; 0 outside of a task.
    """
    thread: _TaskThread | None = getattr(_here, "thread", None)
    return (blocking(), 0.0) if thread is None else thread.wait(blocking)


class Interleaver:
    """A scheduler of interleaved tasks and its threads, which are kept from call to call since they are slow to start.

    It is a context manager that ends the threads. Tasks may use interleavers of their own.

    Args:
        width: tasks that are under way at once, 1 or more.

    Attributes:
        current: the number of the task that computes, None between tasks.
    """

    def __init__(self, width: int) -> None:
        self.current: int | None = None
        self._yielded: SimpleQueue[None] = SimpleQueue()
        # A single task needs no thread of its own.
        self._threads = [_TaskThread(number, self._yielded) for number in range(width if width > 1 else 0)]

    def __enter__(self) -> Interleaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the threads. Idempotent."""
        for thread in self._threads:
            thread.quit()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def run(self, tasks: Sequence[Callable[[], ResultT]]) -> list[ResultT]:
        """Run tasks, as many at once as there are threads; when one ends, the next begins.

        Args, returns and errors are those of ``interleave``.
        """
        if len(tasks) < 2 or not self._threads:
            return [self._alone(number, task) for number, task in enumerate(tasks)]
        state = ThreadState.here()
        jobs = [_Job(number, task, state) for number, task in enumerate(tasks)]
        to_start = deque(jobs)
        rotation = deque(self._threads[: len(jobs)])
        with RandomStreams(len(jobs)) as streams:
            try:
                while rotation:
                    thread = rotation[0]
                    if thread.job is None:
                        if not to_start:
                            rotation.popleft()
                            continue
                        thread.take(to_start.popleft())
                    # After the end of a task, the next task on its thread begins at once: others still wait.
                    if self._turn(thread, streams):
                        rotation.rotate(-1)
            except BaseException:
                self._stop(streams)
                raise
            finally:
                self.current = None
        return [job.result() for job in jobs]

    def _alone(self, number: int, task: Callable[[], ResultT]) -> ResultT:
        self.current = number
        try:
            return task()
        finally:
            self.current = None

    def _turn(self, thread: _TaskThread, streams: RandomStreams) -> bool:
        """Let a thread compute up to its next wait or the end of its task; returns whether the task goes on."""
        job = thread.job
        assert job is not None
        thread.answer()
        self._compute(thread, job, streams)
        if thread.job is None:
            job.check()
        return thread.job is not None

    def _compute(self, thread: _TaskThread, job: _Job[Any], streams: RandomStreams) -> None:
        self.current = job.number
        with streams.of(job.number):
            thread.compute()

    def _stop(self, streams: RandomStreams) -> None:
        """End every task at its present wait, one after the other."""
        for thread in self._threads:
            thread.stopping = True
            while (job := thread.job) is not None:
                self._compute(thread, job, streams)
            thread.stopping = False


class _Stopped(BaseException):
    """Ends a task because another failed. It is no ``Exception``, so that no task handles it as a failed wait."""


class _Job(Generic[ResultT]):
    """One task with its result or error."""

    def __init__(self, number: int, task: Callable[[], ResultT], state: ThreadState) -> None:
        self.number = number
        self._task = task
        self._state = state
        self._context = contextvars.copy_context()
        self._results: list[ResultT] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        """Run the task on this thread."""
        try:
            self._results.append(self._context.run(self._in_state))
        except BaseException as error:
            self._error = error

    def check(self) -> None:
        """Raise the error of the task, if it failed."""
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # whose traceback leads back to this frame

    def result(self) -> ResultT:
        """The result of the task."""
        return self._results[0]

    def _in_state(self) -> ResultT:
        with self._state.entered():
            return self._task()


class _TaskThread(threading.Thread):
    """A thread that computes only in its turns.

    It shares its state with the scheduling thread in plain attributes. Tokens in queues wake either thread. There may
    be more tokens than turns, so a thread that wakes reads the attributes.
    """

    def __init__(self, number: int, yielded: SimpleQueue[None]) -> None:
        super().__init__(name=f"ciphertune-task-{number}", daemon=True)
        self.job: _Job[Any] | None = None
        self.stopping = False
        self._yielded = yielded
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._computing = False
        self._quitting = False
        self._blocking: Callable[[], Any] | None = None
        self._since = 0.0
        self._answer: Callable[[], tuple[Any, float]] | None = None

    # On the thread that runs the tasks.

    def take(self, job: _Job[Any]) -> None:
        """Set the job that the thread begins at its next turn."""
        if self.ident is None:
            self.start()
        self.job = job

    def answer(self) -> None:
        """Call the blocking function that the thread waits for, if it waits."""
        blocking, self._blocking = self._blocking, None
        if blocking is None:
            return
        seconds = time.perf_counter() - self._since
        try:
            value, more = wait_for_reply(blocking)
        except Exception as error:
            self._answer = _raising(error)
        else:
            self._answer = lambda: (value, seconds + more)

    def compute(self) -> None:
        """Give the thread its turn, and wait until it yields."""
        self._computing = True
        self._wake.put(None)
        while self._computing:
            self._yielded.get()

    def quit(self) -> None:
        """End the thread; a task that it still runs ends at its next wait."""
        self._quitting = True
        self._wake.put(None)

    # On its own thread.

    def run(self) -> None:
        """Run one job after the other, each in the thread's turns."""
        _here.thread = self
        flush_here()
        while self._await_turn():
            if self.job is not None:
                self.job.run()
            self.job = None
            self._yield_turn()

    def wait(self, blocking: Callable[[], ResultT]) -> tuple[ResultT, float]:
        """Yield until ``blocking`` was called and the turn comes again."""
        if not self.stopping:
            self._blocking, self._since = blocking, time.perf_counter()
            self._yield_turn()
            self._await_turn()
        answer, self._answer = self._answer, None
        if answer is None or self.stopping or self._quitting:
            self._blocking = None
            raise _Stopped
        return answer()

    def _yield_turn(self) -> None:
        self._computing = False
        self._yielded.put(None)

    def _await_turn(self) -> bool:
        while not (self._computing or self._quitting):
            self._wake.get()
        return not self._quitting


def _raising(error: Exception) -> Callable[[], tuple[Any, float]]:
    def answer() -> tuple[Any, float]:
        raise error

    return answer
