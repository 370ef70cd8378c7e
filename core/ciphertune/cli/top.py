"""The command ``ciphertune top``."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import queue
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

    from ciphertune.client.monitor import WorkerState
    from ciphertune.status import WorkerStatus

_HISTORY = 24
_NAME = 24
_LEVELS = (140, 110, 100, 90, 76, 60, 0)
_PAST = 110
_BLOCKS = " ▁▂▃▄▅▆▇█"


@click.command()
@click.argument("url")
@click.option(
    "--interval", type=click.FloatRange(0.2, 3600), default=2.0, show_default=True, help="Seconds between looks."
)
@click.option(
    "--timeout", type=click.FloatRange(0.05, 60), default=2.0, show_default=True, help="Seconds to wait for answers."
)
@click.option("--once", is_flag=True, help="Look once and end; status 1 if a worker does not answer.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object a line for every look.")
@click.pass_context
def top(ctx: click.Context, url: str, interval: float, timeout: float, once: bool, as_json: bool) -> None:
    """Watch workers: load, sessions, queue, throughput.

    URL is TRANSPORT://HOST:PORT[,HOST:PORT…][?option=value&…], for example 'zmq://10.0.0.5:5555?curve=keys', or the
    selection string that trains with these workers. Keys: q quits.

    Where standard output is no terminal, it looks once.
    """
    from ciphertune.client.monitor import Watch

    with Watch(url) as watch:
        if as_json:
            while True:
                states = watch.look(timeout)
                click.echo(json.dumps(_document(states)))
                if once:
                    break
                time.sleep(interval)
        elif once or not sys.stdout.isatty():
            from rich.console import Console

            states = watch.look(timeout)
            Console().print(screen(states, {}, Console().width, ""))
        else:
            _live(watch.look, interval, timeout)
            return
    if any(state.state == "silent" for state in states):
        ctx.exit(1)


def _document(states: Sequence[WorkerState]) -> dict[str, Any]:
    workers = []
    for state in states:
        row = dataclasses.asdict(state)
        status = row.pop("status")
        del status["draining"]  # its state says so
        workers.append({**row, **status})
    return {"time": round(time.time(), 3), "workers": workers}


def _live(look: Callable[[float], list[WorkerState]], interval: float, timeout: float) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console()
    history: dict[str, collections.deque[float]] = {}
    # Keys are heard while workers are waited for.
    seen: queue.SimpleQueue[list[WorkerState] | BaseException] = queue.SimpleQueue()
    ended = threading.Event()

    def looking() -> None:
        try:
            while True:
                begun = time.monotonic()
                seen.put(look(timeout))
                if ended.wait(max(0.0, begun + interval - time.monotonic())):
                    return
        except BaseException as error:
            seen.put(error)

    every = f"every {interval:g} s"
    with (
        _keys() as pressed,
        Live(Text("asking the workers …"), console=console, screen=True, auto_refresh=False) as live,
    ):
        live.refresh()
        threading.Thread(target=looking, name="ciphertune-top", daemon=True).start()
        try:
            while "q" not in pressed(0.1).lower():
                with contextlib.suppress(queue.Empty):
                    states = seen.get_nowait()
                    if isinstance(states, BaseException):
                        raise states
                    for state in states:
                        past = history.setdefault(state.worker, collections.deque(maxlen=_HISTORY))
                        past.append(state.status.busy or 0.0)
                    # The window may have another size by now.
                    live.update(screen(states, history, console.width, every), refresh=True)
        finally:
            ended.set()


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """``pressed(seconds)``: keys that are pressed within that time, or an empty text."""

    def deaf(seconds: float) -> str:
        time.sleep(seconds)
        return ""

    try:
        import termios
        import tty

        descriptor = sys.stdin.fileno()
        before = termios.tcgetattr(descriptor)
    except (ImportError, OSError, ValueError):  # no terminal, or none of this kind: Ctrl-C ends it
        yield deaf
        return
    except termios.error:
        yield deaf
        return

    def pressed(seconds: float) -> str:
        readable, _, _ = select.select([descriptor], [], [], seconds)
        if not readable:
            return ""
        keys = os.read(descriptor, 64)
        if not keys:  # the terminal is gone
            raise KeyboardInterrupt
        return keys.decode(errors="replace")

    try:
        tty.setcbreak(descriptor)
        yield pressed
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def screen(
    states: Sequence[WorkerState], history: dict[str, collections.deque[float]], width: int, every: str
) -> RenderableType:
    """Picture of the workers' states for a terminal.

    Args:
        states: of the workers.
        history: past shares of busy time by worker, drawn where there is room.
        width: columns of the terminal.
        every: note on the interval, for the last line; empty for a picture that is shown once.
    """
    from rich.console import Group
    from rich.text import Text

    up = sum(state.state != "silent" for state in states)
    head = Text.assemble(
        ("ciphertune top", "bold"),
        f"  {time.strftime('%H:%M:%S')}  ",
        (f"{up} of {len(states)} workers answer", "green" if up == len(states) else "bold red"),
    )
    foot = Text(f"q quit  {every}", style="dim") if every else Text("")
    parts: list[RenderableType] = [head, _table(states, history, width)]
    parts += [Text(f"{s.worker}: {s.problem}", style="red") for s in states if s.state == "silent"]
    parts += [Text(f"{s.worker}: {s.excluded}", style="red") for s in states if s.excluded]
    return Group(*parts, *([foot] if every else []))


def _table(states: Sequence[WorkerState], history: dict[str, collections.deque[float]], width: int) -> Table:
    """The table, with as many columns as fit beside the workers' names."""
    from rich.table import Table
    from rich.text import Text

    def cells(column: tuple[str, Any], past: bool) -> list[Text]:
        title, cell = column
        if title == "BUSY":
            return [_busy(state, list(history.get(state.worker, ())) if past else []) for state in states]
        return [Text(cell(state)) for state in states]

    wanted = min(_NAME, max(len(state.worker) for state in states))
    for level in _LEVELS:
        columns = [column for least, column in _COLUMNS if least <= level]
        rows = [cells(column, level >= _PAST and bool(history)) for column in columns]
        widths = [max(len(c[0]), *(t.cell_len for t in row)) for c, row in zip(columns, rows, strict=True)]
        widths[0] = width - sum(widths[1:]) - len(widths)
        if widths[0] >= wanted:
            break
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold reverse")
    for (title, _), room in zip(columns, widths, strict=True):
        left = title in ("WORKER", "BUSY", "DEVICE")
        table.add_column(
            title, justify="left" if left else "right", no_wrap=True, overflow="ellipsis", width=max(room, 1)
        )
    for n, state in enumerate(states):
        table.add_row(*(row[n] for row in rows), style="dim" if state.state == "silent" else None)
    return table


def _busy(state: WorkerState, before: Sequence[float]) -> Text:
    from rich.text import Text

    if state.state == "silent":
        return Text("no answer", style="red")
    if state.status.busy is None:
        return Text("?")
    colour = "green" if state.status.busy < 0.7 else "yellow" if state.status.busy < 0.9 else "red"
    full = round(10 * state.status.busy)
    text = Text.assemble(("█" * full, colour), ("░" * (10 - full), "dim"))
    if state.state == "draining":
        text = Text("draining".ljust(10), style="yellow")
    text.append(f" {100 * state.status.busy:3.0f}%")
    if before:
        drawn = "".join(_BLOCKS[min(8, int(8.999 * b))] for b in before)
        text.append(" " + drawn.rjust(_HISTORY), style=colour)
    return text


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _running(status: WorkerStatus) -> int | None:
    """Requests that are under way and no longer wait."""
    return None if status.under_way is None or status.queued is None else status.under_way - status.queued


def _rate(value: float | None) -> str:
    """Megabytes a second, of which workers tell whole ones."""
    return "" if value is None else "<1" if value < 1e6 else f"{value / 1e6:,.0f}"


def _size(value: float | None) -> str:
    if value is None:
        return ""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.0f}"


def _time(seconds: float | None) -> str:
    """A time, short.

    >>> _time(59), _time(3700), _time(200000)
    ('59s', '1h01m', '2d07h')
    """
    if seconds is None:
        return ""
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if days:
        return f"{days}d{hours % 24:02d}h"
    if hours:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{minutes}m{int(seconds) % 60:02d}s" if minutes else f"{seconds:.0f}s"


# How wide a window has to be for it, about; title, and text of a cell. Of all clients; MY is of this one alone.
_COLUMNS: tuple[tuple[int, tuple[str, Any]], ...] = (
    (0, ("WORKER", lambda s: s.worker)),
    (0, ("BUSY", lambda s: "")),
    (0, ("SESS", lambda s: _count(s.status.sessions))),
    (60, ("CLI", lambda s: _count(s.status.clients))),
    (0, ("QUEUE", lambda s: _count(s.status.queued))),
    (60, ("RUN", lambda s: _count(_running(s.status)))),
    (60, ("IN MB/s", lambda s: _rate(s.status.bytes_in_per_second))),
    (60, ("OUT MB/s", lambda s: _rate(s.status.bytes_out_per_second))),
    (90, ("MY PROD/s", lambda s: "" if s.products_per_second is None else f"{s.products_per_second:.1f}")),
    (140, ("MY PRODUCTS", lambda s: _count(s.status.own.products))),
    (140, ("MY IN", lambda s: _size(s.status.own.bytes_in))),
    (140, ("MY OUT", lambda s: _size(s.status.own.bytes_out))),
    (140, ("MS", lambda s: "" if s.latency is None else f"{1000 * s.latency:.0f}")),
    (76, ("UP", lambda s: _time(s.status.uptime_seconds))),
    (100, ("DEVICE", lambda s: s.status.device or "")),
    (100, ("VERSION", lambda s: s.status.version or "")),
)
