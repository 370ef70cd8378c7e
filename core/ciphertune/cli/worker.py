"""The command ``ciphertune worker``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ciphertune._support.logs import log_to_stderr
from ciphertune.cli.offered import backends_option, offered_backends
from ciphertune.cli.pairs import name_values


@click.command()
@click.argument("bundles", nargs=-1, metavar="BUNDLE...", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--config",
    "config_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="TOML file that says all of this, and more; read again at SIGHUP.",
)
@click.option("--bind", "address", default="tcp://127.0.0.1:5555", show_default=True, help="Address to listen on.")
@click.option("--transport", default="zmq", show_default=True, help="Transport to serve over.")
@click.option("--curve", default=None, help="Folder with worker.key and clients/; see 'ciphertune keys'.")
@click.option("--insecure", is_flag=True, help="Plain TCP, on a loopback address only.")
@click.option(
    "--no-authentication",
    is_flag=True,
    help="Plain TCP on any address: anyone who can reach it can use this worker, and alter traffic unnoticed.",
)
@click.option("-o", "--option", "extra", multiple=True, metavar="NAME=VALUE", help="Any option of the transport.")
@backends_option()
@click.option("--layers", multiple=True, help="Serve only layers that match; may be repeated.")
@click.option("--verify/--no-verify", default=True, help="Check the weights against their hashes first.")
@click.option("--device", default="cpu", show_default=True, help="Device that evaluates products.")
@click.option("--threads", type=click.IntRange(1), default=None, help="CPU threads of a product.  [default: all cores]")
@click.option(
    "--evaluators", type=click.IntRange(1, 64), default=1, show_default=True, help="Products evaluated at a time."
)
@click.option(
    "--max-requests", type=click.IntRange(1), default=64, show_default=True, help="Requests of one client under way."
)
@click.option(
    "--max-client-mb",
    type=click.IntRange(1),
    default=2048,
    show_default=True,
    help="Memory of one client's requests and replies.",
)
@click.option("--max-message-mb", type=click.IntRange(1), default=1024, show_default=True, help="Size of one message.")
@click.option("--max-sessions", type=click.IntRange(1), default=4, show_default=True, help="Sessions of one client.")
@click.option(
    "--max-key-mb",
    type=click.IntRange(1),
    default=1024,
    show_default=True,
    help="Evaluation keys of one client's sessions; of all clients' eight times that.",
)
@click.option(
    "--idle", type=click.FloatRange(0.1), default=600.0, show_default=True, help="Seconds a session may idle."
)
@click.option(
    "--withhold-weights",
    is_flag=True,
    help="Let no client read codes. One that has to prepare itself from them, as mlwe does, then needs them from "
    "elsewhere.",
)
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65535),
    default=None,
    help="Prometheus metrics, /live and /ready; 0: any port.",
)
@click.option("--metrics-host", default="127.0.0.1", show_default=True, help="Address of the metrics.")
@click.option(
    "--audit", type=click.Path(dir_okay=False, path_type=Path), help="SQLite file for a record of each session."
)
@click.option(
    "--drain", type=click.FloatRange(0), default=30.0, show_default=True, help="Seconds to finish in on SIGTERM."
)
@click.option(
    "--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True, help="Form of the log."
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    help="Least level of the log.",
)
@click.pass_context
def worker(
    context: click.Context,
    bundles: tuple[Path, ...],
    config_file: Path | None,
    address: str,
    transport: str,
    curve: str | None,
    insecure: bool,
    no_authentication: bool,
    extra: tuple[str, ...],
    backends: str,
    layers: tuple[str, ...],
    verify: bool,
    device: str,
    threads: int | None,
    evaluators: int,
    max_requests: int,
    max_client_mb: int,
    max_message_mb: int,
    max_sessions: int,
    max_key_mb: int,
    idle: float,
    withhold_weights: bool,
    metrics_port: int | None,
    metrics_host: str,
    audit: Path | None,
    drain: float,
    log_format: str,
    log_level: str,
) -> None:
    """Serve the layers of each BUNDLE, a worker folder that 'ciphertune split' wrote.

    Prints a line 'ready ADDRESS' on standard output when it takes requests, one for each address. SIGTERM finishes the
    requests that are under way and ends it with status 0; a second one, or SIGINT, ends it at once. SIGHUP has it read
    the file of --config again: bundles, addresses, backends and quotas change, and sessions stay.
    """
    given = [
        name
        for name in context.params
        if name not in ("config_file", "bundles")
        and context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    ]
    if config_file is not None and (given or bundles):
        names = ", ".join(["BUNDLE"] * bool(bundles) + given)
        raise click.UsageError(f"--config says everything: leave out {names}, or --config")
    if config_file is None and not bundles:
        raise click.UsageError("name a BUNDLE to serve, or a file with --config")
    content: dict[str, Any] = {
        "bundles": [str(bundle) for bundle in bundles],
        "layers": list(layers) or None,
        "verify": verify,
        "device": device,
        "threads": threads,
        "evaluators": evaluators,
        "drain": drain,
        "audit": None if audit is None else str(audit),
        "bind": [
            {
                "address": address,
                "transport": transport,
                "curve": curve,
                "insecure": insecure,
                "no_authentication": no_authentication,
                "options": name_values(extra),
            }
        ],
        "quotas": {
            "requests": max_requests,
            "client_mb": max_client_mb,
            "message_mb": max_message_mb,
            "sessions": max_sessions,
            "key_mb": max_key_mb,
            "idle": idle,
            **({"readings": 0} if withhold_weights else {}),
        },
        "metrics": {"port": metrics_port, "host": metrics_host},
        "log": {"format": log_format, "level": log_level},
    }
    # Before torch is imported, which takes seconds: what cannot be read is told at once.
    from ciphertune._support.options import build_section
    from ciphertune.runs.worker_config import WorkerConfig, load_worker_config

    def read() -> WorkerConfig:
        if config_file is not None:
            return load_worker_config(config_file)
        offered = offered_backends(backends)
        return build_section(WorkerConfig, {**content, "backends": ["all"] if offered is None else offered})

    config = read()
    with log_to_stderr(config.log.format, config.log.level):
        from ciphertune.runs.worker import serve_worker

        serve_worker(config, lambda at: click.echo(f"ready {at}"), read)
