"""The command ``python -m ciphertune_http NAME``: make a token for a client, and its hash for the worker."""

from __future__ import annotations

import argparse
from pathlib import Path

from ciphertune.errors import CipherTuneError
from ciphertune_http.tokens import make_token


def main() -> None:
    """Make a token."""
    parser = argparse.ArgumentParser(prog="python -m ciphertune_http", description=__doc__)
    parser.add_argument("name", help="the client's name, one word; quotas and logs go by it")
    parser.add_argument("--token", type=Path, default=Path("client.token"), help="written for the client (0600)")
    parser.add_argument("--tokens", type=Path, default=Path("tokens.txt"), help="the worker's list, appended to")
    options = parser.parse_args()
    try:
        make_token(options.token, options.tokens, options.name)
    except CipherTuneError as error:
        parser.exit(1, f"{error}\n")
    print(f"{options.token}: for {options.name} alone. {options.tokens}: for the worker.")  # noqa: T201


if __name__ == "__main__":
    main()
