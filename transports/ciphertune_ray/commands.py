"""The command ``ciphertune ray``: deployments on a cluster. Ray is imported when a command runs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import click

from ciphertune.cli.offered import backends_option, offered_backends
from ciphertune.cli.pairs import name_values
from ciphertune.errors import PluginError, SelectionError, TransportError
from ciphertune.hookspecs import hookimpl
from ciphertune.plugins import registry

interface = 1


@hookimpl
def ciphertune_register_commands(cli: click.Group) -> None:
    """Add the group ``ray``."""
    cli.add_command(ray)


_ADDRESS = click.option(
    "--address", default="auto", show_default=True, help="The cluster: auto, HOST:PORT, or gcs://HOST:PORT."
)
_NAME = click.option("--name", default="ciphertune", show_default=True, help="Of the deployment.")
_TIMEOUT = click.option(
    "--timeout", type=click.FloatRange(1), default=300.0, show_default=True, help="Seconds to wait for room."
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def ray() -> None:
    """Workers on a Ray cluster."""


@ray.command()
@click.argument("bundle")
@_ADDRESS
@_NAME
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="In all, those there included.")
@click.option(
    "--placement",
    default="",
    metavar="PLACEMENT",
    help="Of the model on workers: rows of every layer at each, layers, or numbers of these, as in layers:2,rows:4; "
    "more workers are replicas.  [default: as few parts of whole layers as fit]",
)
@click.option("--cpus", type=click.FloatRange(0), default=1.0, show_default=True, help="Of a worker.")
@click.option("--gpus", type=click.FloatRange(0), default=0.0, show_default=True, help="Of a worker.")
@click.option("--memory-gb", type=click.FloatRange(0.001), default=None, help="Of a worker.  [default: its need]")
@click.option("--threads", type=click.IntRange(1), default=None, help="CPU threads of a product.  [default: --cpus]")
@click.option("--max-restarts", type=click.IntRange(-1), default=-1, show_default=True, help="Of a worker; -1: any.")
@click.option(
    "--max-task-retries",
    type=click.IntRange(-1),
    default=0,
    show_default=True,
    help="By Ray. Clients repeat requests themselves, at a replica where there is one.",
)
@click.option("--max-requests", type=click.IntRange(1), default=64, show_default=True, help="Under way, per client.")
@click.option("--max-client-mb", type=click.IntRange(1), default=2048, show_default=True, help="Memory of one client.")
@click.option(
    "--idle", type=click.FloatRange(0.1), default=600.0, show_default=True, help="Seconds a session may idle."
)
@backends_option()
@click.option(
    "--listen",
    default="",
    metavar="TRANSPORT",
    help="Serve workers over this transport too, as zmq, to clients that are no part of the cluster.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65000),
    default=5555,
    show_default=True,
    help="Of worker 0; then upwards. 0: any free ones, with --addresses.",
)
@click.option(
    "--addresses",
    default="",
    metavar="FOLDER",
    help="Where worker I writes its address as I.address, whenever it starts; on a path that all machines share.",
)
@click.option("-o", "--option", "extra", multiple=True, metavar="NAME=VALUE", help="Of that transport, as curve=KEYS.")
@_TIMEOUT
@_JSON
def up(
    bundle: str,
    address: str,
    name: str,
    workers: int,
    placement: str,
    cpus: float,
    gpus: float,
    memory_gb: float | None,
    threads: int | None,
    max_restarts: int,
    max_task_retries: int,
    max_requests: int,
    max_client_mb: int,
    idle: float,
    backends: str,
    listen: str,
    port: int,
    addresses: str,
    extra: tuple[str, ...],
    timeout: float,
    as_json: bool,
) -> None:
    """Have WORKERS workers serve BUNDLE: start a deployment, or make one larger or smaller.

    BUNDLE is what 'ciphertune split' wrote, on a path that all machines of the cluster share, or a URL that fsspec
    reads, such as s3://bucket/bundle.
    """
    from ciphertune_ray.address import absolute

    wanted = {
        "workers": workers,
        "placement": placement,
        "memory": int((memory_gb or 0) * 1e9),
        "cpus": cpus,
        "gpus": gpus,
        "threads": threads or 0,
        "restarts": max_restarts,
        "retries": max_task_retries,
        "max_requests": max_requests,
        "max_client_mb": max_client_mb,
        "idle_seconds": idle,
        "backends": tuple(offered_backends(backends) or ()),
        "listen": listen,
        "port": port,
        "listen_options": name_values(extra),
        "addresses": absolute(addresses) if addresses else "",
    }
    if addresses and not listen:
        raise SelectionError("--addresses are of workers that --listen TRANSPORT has clients outside the cluster reach")
    if listen and not port and not addresses:
        raise SelectionError("--port 0 takes any free port, so name a folder with --addresses where clients find it")
    if listen:
        registry.load(registry.TRANSPORTS, listen)
    with _joined(address, name) as deployment:
        spec = deployment.plan(deployment.Wanted(absolute(bundle), **wanted))
        known = deployment.spec_of(name)
        if known is not None and known.parts != spec.parts:
            raise SelectionError(
                f"the deployment {name!r} serves {known.bundle} in {len(known.parts)} parts: take another --name, or "
                f"end it with 'ciphertune ray down --name {name}' first"
            )
        deployment.shrink(name, workers)
        deployment.grow(name, spec, workers, shared=True, seconds=timeout)
        found = {name: deployment.describe(name)}
    _show(address, found, as_json)


@ray.command()
@_ADDRESS
@click.option("--name", default=None, help="Of one deployment.  [default: all]")
@_JSON
def status(address: str, name: str | None, as_json: bool) -> None:
    """List deployments, their workers, and where those run."""
    with _joined(address, name) as deployment:
        names = deployment.deployments() if name is None else [name]
        found = {each: deployment.describe(each) for each in names}
    _show(address, found, as_json)


@ray.command()
@_ADDRESS
@_NAME
@click.option("--min-workers", type=click.IntRange(1), default=1, show_default=True, help="At least.")
@click.option("--max-workers", type=click.IntRange(1), required=True, help="At most.")
@click.option(
    "--queue",
    type=click.FloatRange(0),
    default=2.0,
    show_default=True,
    help="Requests that wait, of a worker on average, above which there are too few.",
)
@click.option(
    "--busy", type=click.FloatRange(0), default=15.0, show_default=True, help="Seconds of that before one is added."
)
@click.option(
    "--idle",
    type=click.FloatRange(0),
    default=300.0,
    show_default=True,
    help="Seconds without any that wait, and with a worker to spare, before one ends.",
)
@click.option("--interval", type=click.FloatRange(0.1), default=5.0, show_default=True, help="Seconds between looks.")
@_TIMEOUT
def scale(
    address: str,
    name: str,
    min_workers: int,
    max_workers: int,
    queue: float,
    busy: float,
    idle: float,
    interval: float,
    timeout: float,
) -> None:
    """Add and end workers by the requests that wait at them, until interrupted.

    Where the model is in parts, a worker for each part is added or ended at a time.
    """
    with _joined(address, name) as deployment:
        from ciphertune_ray.scaling import Scale

        wanted = Scale(min_workers, max_workers, queue, busy, idle)
        deployment.keep_scaled(name, wanted, interval, timeout, lambda: False)


@ray.command()
@_ADDRESS
@_NAME
@_JSON
def down(address: str, name: str, as_json: bool) -> None:
    """End a deployment. Its clients' requests fail."""
    with _joined(address, name) as deployment:
        gone = deployment.shrink(name, 0)
    if not gone:
        raise TransportError(f"the cluster has no deployment named {name!r}")
    if as_json:
        from ciphertune.cli.output import print_json

        print_json({"name": name, "stopped": len(gone)})
    else:
        click.echo(f"stopped {len(gone)} workers of {name}")


@contextlib.contextmanager
def _joined(address: str, name: str | None) -> Iterator[Any]:
    """Join the cluster, give the module of what can be done there, and leave."""
    from ciphertune_ray.address import parse

    where = parse(address)
    if where.name is not None or where.cluster == "local":
        raise SelectionError(f"--address is a cluster that runs already, as in auto or HOST:10001, not {address!r}")
    if name is not None:
        parse(f"{address}/{name}")
    # Ray prints messages of the cluster to stdout, where only JSON may stand.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            import ray

            from ciphertune_ray import deployment
            from ciphertune_ray.relay import join, one_line
        except ImportError as error:
            raise PluginError('the ray commands need Ray: pip install "ciphertune[ray]"') from error
        try:
            try:
                join(where.ray)
            except Exception as error:
                raise TransportError(f"the cluster {address} cannot be joined: {one_line(error)}") from error
            yield deployment
        finally:
            ray.shutdown()


def _show(address: str, found: dict[str, list[dict[str, Any]]], as_json: bool) -> None:
    from ciphertune.cli.output import megabytes, print_json, print_table

    if as_json:
        print_json({name: [_plain(worker) for worker in workers] for name, workers in found.items()})
        return
    for name, workers in found.items():
        rows = [
            (
                worker["index"],
                worker["state"],
                worker.get("host", ""),
                worker.get("node", "")[:8],
                worker.get("device", worker.get("started", "")),
                worker.get("part", ""),
                worker.get("layers", ""),
                megabytes(worker["weight_bytes"]) if "weight_bytes" in worker else "",
                worker.get("sessions", ""),
                worker.get("address", ""),
            )
            for worker in workers
        ]
        columns = ["worker", "state", "host", "node", "device", "part", "layers", "weights", "sessions", "listens on"]
        print_table(f"{name}: --to mlwe+ray://{address}/{name}", columns, rows)
    if not found:
        click.echo("nothing is deployed")


def _plain(worker: dict[str, Any]) -> dict[str, Any]:
    """Replace the names of layers, which are many, by their number."""
    if "spec" not in worker:
        return worker
    parts = [
        {"folder": folder, "layers": len(layers), "rows": f"{row + 1} of {rows}"}
        for folder, layers, (row, rows) in worker["spec"]["parts"]
    ]
    return {**worker, "spec": {**worker["spec"], "parts": parts}}
