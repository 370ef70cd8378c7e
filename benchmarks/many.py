"""How many workers serve a thousand clients and a hundred thousand, and what a million tokens cost, on paper.

``python benchmarks/many.py`` takes some minutes. Nothing is measured: speeds are those of ``speeds.json`` beside this
file, which ``ciphertune plan smollm2 --to mlwe+zmq:// --clients 20 --chats 0.9 --save-speeds benchmarks/speeds.json``
wrote on a quiet machine. It writes ``many.json``; then ``python docs/generate.py`` makes the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from ciphertune.planning.capacity import Capacity, ClientMix, Prices, plan_capacity
from ciphertune.planning.plan import bytes_per_second, seconds
from ciphertune.planning.speeds import Speeds, read_speeds

HERE = Path(__file__).parent
TO, MODEL = "mlwe+zmq://", "smollm2"
PRICES = Prices(worker=0.8, traffic=0.05)
LINES = {
    "at home": ("20Mbit/s", "100Mbit/s", "20ms"),
    "in the same city": ("1Gbit/s", "1Gbit/s", "1ms"),
    "beside the workers": ("10Gbit/s", "10Gbit/s", "0.2ms"),
}
"""Of a client: up, down, and latency one way."""


def planned(clients: int, chats: float, line: tuple[str, str, str], speeds: Speeds) -> dict[str, Any]:
    up, down, latency = line
    found = plan_capacity(
        MODEL,
        TO,
        ClientMix(clients, chats),
        bandwidth=bytes_per_second(up),
        down=bytes_per_second(down),
        latency=seconds(latency),
        prices=PRICES,
        client=speeds,
        worker=speeds,
    )
    return {"enough": shown(found.enough), "tried": [shown(one) for one in found.tried], "slowdown": found.slowdown}


def apart(clients: int, chats: float, line: tuple[str, str, str], speeds: Speeds) -> dict[str, Any]:
    """The same with workers of their own for chats and for training."""
    chatting = round(clients * chats)
    kinds = (chatting, 1.0), (clients - chatting, 0.0)
    parts = [planned(count, share, line, speeds)["enough"] for count, share in kinds]
    tokens = sum(one["tokens_per_second"] for one in parts)
    price = sum(one["tokens_per_second"] * one["price"] for one in parts) / tokens
    return {"chats": parts[0], "training": parts[1], "price": price, "tokens_per_second": tokens}


def shown(one: Capacity) -> dict[str, Any]:
    return {**dataclasses.asdict(one), "slowdown": one.slowdown}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1000, 100_000])
    parser.add_argument("--chats", type=float, default=0.9, help="share of clients that chat")
    parser.add_argument("--speeds", type=Path, default=HERE / "speeds.json")
    parser.add_argument("--json", type=Path, default=HERE / "many.json")
    arguments = parser.parse_args()
    speeds, rows = read_speeds(arguments.speeds), []
    for where, line in LINES.items():
        for clients in arguments.clients:
            found = planned(clients, arguments.chats, line, speeds)
            found["apart"] = apart(clients, arguments.chats, line, speeds)
            rows.append({"clients": clients, "where": where, "line": line, **found})
            enough = found["enough"]
            price = f"{enough['price']:.2f} a million tokens"
            print(f"{clients:,} {where}: {enough['workers']:,} workers, {price}", flush=True)
            content = {"machine": speeds.machine, "chats": arguments.chats, **dataclasses.asdict(PRICES), "rows": rows}
            arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
