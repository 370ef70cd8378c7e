"""The command ``ciphertune keys``."""

from __future__ import annotations

import shlex
from pathlib import Path
from urllib.parse import quote

import click

from ciphertune.cli.output import print_facts, print_json


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--client", "clients", multiple=True, help="Only make a key for this client; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def keys(folder: Path, clients: tuple[str, ...], as_json: bool) -> None:
    """Make the keys with which clients and workers recognise each other, in FOLDER.

    Without --client: one pair for a worker and one for a client named 'client'. Secret keys have mode 0600 and never
    leave the machine they are for: worker.key stays at the worker, client.key at the client. The public worker.pub goes
    to clients, clients/*.pub to the worker, which lets in exactly these.
    """
    from ciphertune.errors import ConfigError
    from ciphertune.plugins import registry

    for name in clients:
        if not name.replace("-", "").replace("_", "").isalnum() or name == "worker":
            raise ConfigError(f"{name!r} cannot be a client's name: use letters, digits, '-' and '_'")
    transport = registry.load(registry.TRANSPORTS, "zmq")
    made = transport.make_keys(folder, clients or ("client",), worker=not clients)
    if as_json:
        print_json(made)
        return
    print_facts(f"Keys in {folder}", made)
    click.echo(
        f"At the worker keep worker.key and clients/; give clients worker.pub and their own .key.\n"
        f"Worker: ciphertune worker BUNDLE --bind tcp://0.0.0.0:5555 --curve {shlex.quote(str(folder))}\n"
        f"Client: mlwe+zmq://HOST:5555?curve={quote(str(folder), safe='/:~')}"
    )
