"""Tokens a second of private generation with a worker far away, each way of fewer round trips beside the plan.

``python benchmarks/generation.py`` splits SmolLM2, starts a worker over zmq on this machine, adds ``--latency`` each
way by the proxy of ``shaped.py``, none with ``--latency 0ms``, and generates: one sequence; sixteen at once; one with
prompt lookup, on text that repeats itself; one with a draft model at the client, whose tokens are verified in one pass;
one with attention's projections at the client. Some ten minutes on two quiet cores; ``--model FOLDER`` with a tiny
model takes one.

The draft model is the same model in the clear unless ``--draft`` names another: every token of it is right, which is
the best case. The tokens that a pass yields are counted, and the plan is told them. Client and worker share this
machine's processors, and the plan assumes that.

``--prefill 512`` also times passes over so many tokens: over this zmq, with the worker in this process, and in the
clear, in turns; the median of each.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from predict import LOOPBACK
from shaped import shaped
from sweep import machine

import ciphertune
from ciphertune.bundle.client import load_client
from ciphertune.models.load import load_named_model
from ciphertune.planning.generating import GenerationPlan, plan_generation
from ciphertune.planning.plan import bytes_per_second, seconds
from ciphertune.worker.process import worker_process
from ciphertune_zmq import ZmqTransport

TO = "mlwe+zmq://"
TEXT = "The patient was admitted on Monday with a cough and a fever. Her temperature fell on Tuesday. "
AT_CLIENT = ("*.mlp.*",)
"""Layers that are outsourced where attention's projections stay at the client."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to generate.

    Attributes:
        name: for people.
        sequences: at once.
        layers: that are outsourced, as of ``ciphertune.split``.
        drafted: tokens proposed for a pass.
        by: who proposes them, ``lookup`` or ``draft``.
    """

    name: str
    sequences: int = 1
    layers: Sequence[str] | None = None
    drafted: int = 0
    by: str = ""


def cases(drafted: int, sequences: int) -> list[Case]:
    return [
        Case("one sequence"),
        Case(f"{sequences} sequences at once", sequences),
        Case("prompt lookup", drafted=drafted, by="lookup"),
        Case("draft model at the client", drafted=drafted, by="draft"),
        Case("attention's projections at the client", layers=AT_CLIENT),
    ]


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a generation took: seconds of the first pass and of the others, their number and bytes, and drafting."""

    first: float
    rest: float
    passes: int
    new_tokens: int
    later_bytes: int
    draft_seconds: float


def generate(model: Any, ids: torch.Tensor, new: int, options: dict[str, Any]) -> Measured:
    """Generate greedily, noting when each pass ends."""
    session = ciphertune.session_of(model)
    ends: list[tuple[float, int]] = []
    drafting = 0.0
    drafts = 0
    forward = model.forward
    draft = options.get("assistant_model")

    def watched(*args: Any, **values: Any) -> Any:
        answer = forward(*args, **values)
        ends.append((time.perf_counter(), session.traffic.bytes_up + session.traffic.bytes_down))
        return answer

    def timed(*args: Any, **values: Any) -> Any:
        nonlocal drafting, drafts
        start = time.perf_counter()
        answer = draft_forward(*args, **values)
        drafting += time.perf_counter() - start
        drafts += 1
        return answer

    model.forward = watched
    if draft is not None:
        draft_forward, draft.forward = draft.forward, timed
    try:
        start = time.perf_counter()
        out = model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, **options)
    finally:
        model.forward = forward
        if draft is not None:
            draft.forward = draft_forward
    (first, sent_first), (last, sent) = ends[0], ends[-1]
    made = int(out.shape[1] - ids.shape[1])
    return Measured(first - start, last - first, len(ends), made, sent - sent_first, drafting / max(drafts, 1))


def run(case: Case, client: Path, to: str, codes: Path, ids: torch.Tensor, new: int, draft: Any) -> Measured:
    model = load_client(client, to, weights=codes)
    model.generation_config.eos_token_id = None
    options: dict[str, Any] = {}
    if case.by == "lookup":
        options["prompt_lookup_num_tokens"] = case.drafted
    elif case.by == "draft":
        draft.generation_config.num_assistant_tokens = case.drafted
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        draft.generation_config.assistant_confidence_threshold = 0.0
        options["assistant_model"] = draft
    try:
        return generate(model, ids.repeat(case.sequences, 1), new, options)
    finally:
        ciphertune.session_of(model).close()


def row(case: Case, found: Measured, planned: GenerationPlan, base: float | None) -> dict[str, Any]:
    """Measurement and prediction of a case; ``base`` is the rate of the first."""
    a_pass = found.new_tokens / found.passes
    later = max(found.passes - 1, 1)
    rate = case.sequences * a_pass * later / found.rest
    assert planned.pass_seconds is not None
    return {
        **dataclasses.asdict(case),
        "round_trips": planned.round_trips,
        "tokens_a_pass": a_pass,
        "first_token_s": found.first,
        "predicted_first_token_s": planned.first_token_seconds,
        "tokens_per_second": rate,
        "predicted_tokens_per_second": planned.tokens_per_second,
        "times_one_sequence": rate / base if base else 1.0,
        "bytes_per_token": found.later_bytes / (later * a_pass * case.sequences),
        "predicted_bytes_per_token": planned.bytes_per_token,
        "passes": found.passes,
    }


def prefill(client: Path, to: str, codes: Path, name: str, tokens: int, repeat: int) -> dict[str, float]:
    """Seconds of a pass over so many tokens, each way; the first of each is not counted."""
    plain, _ = load_named_model(name)
    inside = ciphertune.outsource(load_named_model(name)[0], TO.partition("+")[0])
    far = load_client(client, to, weights=codes)
    ids = torch.arange(1, tokens + 1)[None] % plain.get_input_embeddings().num_embeddings
    found: dict[str, list[float]] = {"plain": [], "inside": [], "zmq": []}
    try:
        with torch.no_grad():
            for _ in range(repeat + 1):
                for way, model in (("plain", plain), ("inside", inside), ("zmq", far)):
                    start = time.perf_counter()
                    model(ids, use_cache=True, logits_to_keep=1)
                    found[way].append(time.perf_counter() - start)
                    # Masks are made ahead in pauses, as between two prompts.
                    time.sleep(1.5)
    finally:
        ciphertune.session_of(far).close()
        ciphertune.session_of(inside).close()
    return {"tokens": tokens, **{way: statistics.median(times[1:]) for way, times in found.items()}}


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| | round trips | tokens a pass | first token | predicted | tokens/s | predicted | times one | MB a token |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r['name']} | {r['round_trips']} | {r['tokens_a_pass']:.1f} | {r['first_token_s']:.2f} s | "
        f"{r['predicted_first_token_s']:.2f} s | {r['tokens_per_second']:.2f} | "
        f"{r['predicted_tokens_per_second']:.2f} | {r['times_one_sequence']:.1f} | {r['bytes_per_token'] / 1e6:.2f} |"
        for r in rows
    ]
    return "\n".join(lines)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    load = os.getloadavg()[0]
    draft, tokenizer = load_named_model(arguments.draft or arguments.model)
    vocabulary = draft.get_input_embeddings().num_embeddings
    ids = torch.tensor([tokenizer(TEXT * arguments.repeat)["input_ids"]]) % vocabulary
    chosen = cases(arguments.drafted, arguments.sequences)
    chosen = [chosen[i] for i in arguments.only] if arguments.only else chosen
    rows: list[dict[str, Any]] = []
    passes: dict[str, float] | None = None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        here = ZmqTransport.loopback(folder, {})
        for layers in dict.fromkeys(case.layers for case in chosen):
            bundle = folder / f"bundle-{layers is None}"
            ciphertune.split(arguments.model, bundle, layers=layers)
            with contextlib.ExitStack() as stack:
                worker = worker_process(bundle / "worker", "zmq", here.address, here.serve)
                address, _ = stack.enter_context(worker)
                if arguments.latency or arguments.bandwidth:
                    address = stack.enter_context(shaped(address, arguments.latency, arguments.bandwidth))
                options = "&".join(f"{key}={value}" for key, value in {**here.connect, "timeout": "600"}.items())
                to = f"{TO}{address}?{options}"
                for case in [case for case in chosen if case.layers == layers]:
                    new = arguments.tokens * (1 if not case.drafted else 2)
                    found = run(case, bundle / "client", to, bundle / "worker", ids, new, copy.copy(draft))
                    planned = plan_generation(
                        arguments.model,
                        TO,
                        sequences=case.sequences,
                        prompt_tokens=ids.shape[1],
                        new_tokens=new,
                        drafted=case.drafted,
                        accepted=min(max(found.new_tokens / found.passes, 1.0), case.drafted + 1.0),
                        draft_seconds=found.draft_seconds,
                        layers=layers,
                        bandwidth=arguments.bandwidth or LOOPBACK,
                        latency=arguments.latency,
                        processors="one",
                    )
                    rows.append(row(case, found, planned, rows[0]["tokens_per_second"] if rows else None))
                    print(table(rows[-1:]).splitlines()[-1], flush=True)
                if arguments.prefill and layers is None:
                    paths = bundle / "client", to, bundle / "worker"
                    passes = prefill(*paths, arguments.model, arguments.prefill, arguments.passes)
    return {
        "machine": machine(load),
        "model": arguments.model,
        "latency_s": arguments.latency,
        "prompt_tokens": ids.shape[1],
        "rows": rows,
        "prefill": passes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="with its tokenizer")
    parser.add_argument("--draft", help="draft model at the client; the model itself if not given")
    parser.add_argument("--latency", type=seconds, default=0.01, help="one way, as 10ms")
    parser.add_argument("--bandwidth", type=bytes_per_second, help="each way, as 1Gbit/s; no limit if not given")
    parser.add_argument("--tokens", type=int, default=16, help="new ones of each sequence; twice as many where drafted")
    parser.add_argument("--drafted", type=int, default=8, help="tokens proposed for a pass")
    parser.add_argument("--sequences", type=int, default=16, help="at once, in the case with several")
    parser.add_argument("--repeat", type=int, default=3, help="how often the prompt says its text")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of cases, from 0")
    parser.add_argument("--prefill", type=int, default=0, help="tokens of passes to time beside plain ones")
    parser.add_argument("--passes", type=int, default=7, help="of each way, of which the median counts")
    parser.add_argument("--json", type=Path, help="file to write")
    arguments = parser.parse_args()
    found = measure(arguments)
    print(table(found["rows"]))
    if found["prefill"]:
        print(", ".join(f"{way} {value:.3g}" for way, value in found["prefill"].items()))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
