"""The ``ciphertune`` command line. Each command's module is imported only when that command runs."""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import click

from ciphertune._support.version import __version__
from ciphertune.errors import CipherTuneError, PluginError
from ciphertune.key_files import hide_process

# Name → (module under ciphertune.cli, one line for --help); the command object has the command's name.
_COMMANDS = {
    "backends": ("listing", "Installed backends and what each protects."),
    "bench": ("bench", "Measure products and training steps against plaintext in the same run."),
    "cache": ("cache", "What backends and transports keep on disk between runs; empty it."),
    "chat": ("chat", "Talk to a model, trained or not, whose layers are at workers."),
    "check": ("check", "Run the conformance suite against an installed plugin, and report."),
    "demo": ("demo", "Fine-tune a real model on real data under encryption, in one command."),
    "doctor": ("doctor", "Versions, threads, kernels and their speed on this machine."),
    "eval": ("eval", "Measure loss, perplexity and accuracy of a model whose layers are at workers."),
    "excluded": ("excluded", "Workers that gave wrong answers; take an exclusion back."),
    "export": ("export", "Merge a trained adapter into its model, or write it for llama.cpp."),
    "generate": ("generate", "Answer prompts by a model whose layers are at workers."),
    "keys": ("keys", "Make the keys with which clients and workers recognise each other."),
    "new": ("new", "Start a project for a transport, a backend or a hook plugin of your own."),
    "plan": ("plan", "What outsourcing a model would mean: shares, traffic, seconds a step."),
    "plugins": ("listing", "Everything that is installed: backends, transports, hook plugins, and their state."),
    "serve": ("serve", "Answer programs by the chat-completions protocol, with a private model."),
    "share": ("share", "Share of a model's weights that would be at the workers, by what is outsourced."),
    "split": ("split", "Split a model into the parts that a data owner and workers hold."),
    "top": ("top", "Watch workers: load, sessions, queue, throughput."),
    "train": ("train", "Fine-tune as a TOML file, or a YAML file of TRL's, says."),
    "transports": ("listing", "Installed transports, and the options that every selection string takes."),
    "usage": ("usage", "What clients used of a worker, from its records of sessions."),
    "worker": ("worker", "Serve the layers of a bundle to clients on other machines."),
}


class LazyGroup(click.Group):
    """A group whose own commands are imported on use and whose plugins may add more."""

    _plugins_asked = False

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Add a plugin's command; a name that is taken is refused to the plugin that comes second."""
        if (name or cmd.name) in {*_COMMANDS, *self.commands}:
            whose = "CipherTune's own" if (name or cmd.name) in _COMMANDS else "another plugin's"
            raise PluginError(f"the command {name or cmd.name!r} is {whose}")
        super().add_command(cmd, name)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; what goes wrong in one of a plugin's is that plugin's fault, and said in one line."""
        try:
            return super().invoke(ctx)
        except (CipherTuneError, OSError, click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            from ciphertune.plugins.blame import place_of
            from ciphertune.plugins.trace import VARIABLE, tracing

            if ctx.invoked_subcommand not in self.commands or tracing():
                raise
            raise PluginError(
                f"the command {ctx.invoked_subcommand!r}, which a plugin added, failed: {type(error).__name__}: {error}"
                f"{place_of(error)}. {VARIABLE}=1 shows the traceback"
            ) from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All command names."""
        self._ask_plugins()
        return sorted({*_COMMANDS, *super().list_commands(ctx)})

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import and return a command."""
        if name in _COMMANDS:
            module = importlib.import_module(f"ciphertune.cli.{_COMMANDS[name][0]}")
            command: click.Command = getattr(module, name)
            return command
        self._ask_plugins()
        return super().get_command(ctx, name)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Suggest the closest command for a name that is none."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            if not near:
                raise
            raise click.UsageError(f"{error.message} Did you mean {near[0]!r}?", ctx) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List commands without importing them."""
        rows = [(name, text) for name, (_, text) in _COMMANDS.items()]
        self._ask_plugins()
        rows += [(name, command.get_short_help_str()) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl(sorted(rows))

    def _ask_plugins(self) -> None:
        if not self._plugins_asked:
            self._plugins_asked = True
            from ciphertune.plugins.manager import plugin_manager

            plugin_manager().add_commands(self)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ciphertune")
def cli() -> None:
    """Fine-tune a model on private data while machines you do not trust do the heavy work, on ciphertext."""


TRACEBACK = "CIPHERTUNE_TRACEBACK"
"""Environment variable that shows the traceback of an error that nobody expected."""

_SPINS = "GOMP_SPINCOUNT"
_SPIN_COUNT = "20000"
"""Times that a thread of torch looks for the next operation before it sleeps, about 0.2 ms: waking it costs small
operations more than they take. By default it would do so for some milliseconds, on processors that others could use.
GNU's OpenMP library reads it once, when torch is imported."""


def _terminated(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _unexpected(error: Exception) -> str:
    """A line on an error that is no type of ours, without its text, which may quote data."""
    from ciphertune.plugins.blame import out_of_memory, place_of
    from ciphertune.plugins.registry import missing_package

    if out_of_memory(error):
        return "there is not enough memory: take smaller batches, shorter sequences or a smaller model"
    if isinstance(error, UnicodeEncodeError):
        return f"the locale of this terminal cannot write a letter ({error.encoding}): set PYTHONUTF8=1 and try again"
    if absent := missing_package(error):
        return absent
    kind = type(error).__name__
    return f"a fault of CipherTune itself: {kind}{place_of(error)}. Please report it; {TRACEBACK}=1 shows more"


def _unwritten(error: OSError) -> str:
    """Says of an error without a file that it was in printing, where it was."""
    frames = traceback.extract_tb(error.__traceback__)
    printing = any(Path(frame.filename).parent.name in ("click", "rich") for frame in frames[-1:])
    return "what this prints cannot be written: " if printing else ""


def main(args: list[str] | None = None) -> NoReturn:
    """Entry point: errors of ours are one line on standard error and exit status 1; Ctrl-C exits with 130."""
    if not os.environ.keys() & {"OMP_WAIT_POLICY", _SPINS}:
        os.environ[_SPINS] = _SPIN_COUNT
    # Keys and decrypted values are in this process.
    hide_process()
    # So that what is half-written is removed, and secrets are overwritten; commands that run on take it themselves.
    signal.signal(signal.SIGTERM, _terminated)
    for stream in (sys.stdout, sys.stderr):
        # Where the locale has no such letter, another stands for it.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        # Standalone, click would turn Ctrl-C into status 1, which a script could not tell from a failure.
        status = cli.main(args=args, prog_name="ciphertune", standalone_mode=False)
    except CipherTuneError as error:
        click.echo(f"ciphertune: {error}", err=True)
        sys.exit(1)
    except OSError as error:
        unwritten = _unwritten(error) if error.filename is None else ""
        where = f"{error.filename}: " if error.filename is not None else unwritten
        click.echo(f"ciphertune: {where}{error.strerror or error}", err=True)
        if unwritten:
            # What is left of it would be written when Python ends, which then shows an error and a status of its own.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("ciphertune: interrupted", err=True)
        sys.exit(130)
    except Exception as error:
        from ciphertune.plugins.trace import tracing

        # Whoever looks for the fault of a plugin wants to see where it is, too.
        if tracing() or os.environ.get(TRACEBACK, "0") not in ("", "0"):
            raise
        click.echo(f"ciphertune: {_unexpected(error)}", err=True)
        sys.exit(1)
    sys.exit(status if isinstance(status, int) else 0)
