"""The command ``ciphertune keys``."""

from __future__ import annotations

import shlex
from pathlib import Path
from urllib.parse import quote

import click

from ciphertune.cli.output import print_facts, print_json


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--worker", "worker", is_flag=True, help="Make a worker's key alone, on the worker's machine.")
@click.option(
    "--client", "clients", multiple=True, help="Make a key for this client alone, on its machine; may be repeated."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def keys(folder: Path, worker: bool, clients: tuple[str, ...], as_json: bool) -> None:
    """Make the keys with which clients and workers recognise each other, in FOLDER.

    Each side makes its own, on its own machine: --worker there, --client NAME here. Only public keys (.pub) travel:
    worker.pub to clients, clients/NAME.pub to the worker, which lets in exactly these. Secret keys (.key) have mode
    0600 and never leave their machine. Without either option both sides are made in one folder, for a rehearsal on
    one machine.
    """
    from ciphertune.errors import ConfigError
    from ciphertune.plugins import registry

    for name in clients:
        if not name.replace("-", "").replace("_", "").isalnum() or name == "worker":
            raise ConfigError(f"{name!r} cannot be a client's name: use letters, digits, '-' and '_'")
    transport = registry.load(registry.TRANSPORTS, "zmq")
    both = worker == bool(clients)
    made = transport.make_keys(folder, clients or (("client",) if both else ()), worker=worker or both)
    if as_json:
        print_json(made)
        return
    print_facts(f"Keys in {folder}", made)
    if worker or both:
        click.echo(
            f"Worker: ciphertune worker BUNDLE --bind tcp://0.0.0.0:5555 --curve {shlex.quote(str(folder))}\n"
            "To send to clients: worker.pub. To get from each of them: its .pub file, into clients/."
        )
    for name in clients or (("client",) if both else ()):
        option = "" if name == "client" else f"&client={name}"
        click.echo(
            f"Client: mlwe+zmq://HOST:5555?curve={quote(str(folder), safe='/:~')}{option}\n"
            f"To send to the worker: clients/{name}.pub. To get from it: worker.pub, into this folder."
        )
    if both:
        click.echo(
            "A rehearsal: this folder holds the secret keys of both sides. For real use make each side's on its own "
            "machine, with --worker there and --client NAME here."
        )
