"""What outsourcing a model would mean, before anything runs: shares, traffic, and an estimate of a step's time."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ciphertune.backend import Backend, Direction, LinearMap
from ciphertune.bench.kernel import bench_kernel
from ciphertune.bundle.skeleton import build
from ciphertune.errors import ConfigError
from ciphertune.layers import Candidate, choose_layers, linear_layers, sibling_groups
from ciphertune.plugins import plugin_manager
from ciphertune.session import choose
from ciphertune.weights import LayerInfo, group_map

_DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
_RATE = re.compile(r"([0-9.]+)\s*([kMGT]?)(bit|B)/s\Z")
_TIME = re.compile(r"([0-9.]+)\s*(us|µs|ms|s)\Z")
_PREFIX = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_UNIT = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}


def bytes_per_second(text: str) -> float:
    """A bandwidth, in bytes a second.

    >>> bytes_per_second("1Gbit/s"), bytes_per_second("10 MB/s")
    (125000000.0, 10000000.0)

    Raises:
        ConfigError: it is not a number with a unit.
    """
    found = _RATE.match(text.strip())
    value = _number(found[1]) if found else 0.0
    if found is None or value <= 0:
        raise ConfigError(f"cannot read the bandwidth {text!r}: write for example 100Mbit/s, 1Gbit/s or 10GB/s")
    return value * _PREFIX[found[2]] / (8 if found[3] == "bit" else 1)


def seconds(text: str) -> float:
    """A time, in seconds.

    >>> seconds("5ms"), seconds("0.5 s")
    (0.005, 0.5)

    Raises:
        ConfigError: it is not a number with a unit.
    """
    found = _TIME.match(text.strip())
    if found is None:
        raise ConfigError(f"cannot read the time {text!r}: write for example 5ms or 0.2s")
    return _number(found[1]) * _UNIT[found[2]]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{text!r} is not a number") from None


@dataclasses.dataclass
class Kind:
    """Groups of layers of the same names and sizes.

    Attributes:
        layers: their last names, joined by +.
        in_features, out_features: K and N, of siblings together.
        count: groups of this kind in the model.
        requests: of a step.
        bytes_up, bytes_down: of a step.
    """

    layers: str
    in_features: int
    out_features: int
    count: int = 0
    requests: int = 0
    bytes_up: int = 0
    bytes_down: int = 0

    @property
    def weights(self) -> int:
        """Of all groups of this kind."""
        return self.count * self.in_features * self.out_features


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one training step by part; estimates, from speeds measured on this machine.

    Attributes:
        encrypt, decrypt: at the client.
        evaluate: at the worker, taken to be like this machine.
        network: bytes over the bandwidth, and twice the latency a request.
        rest: what the client computes itself: attention, output head, adapters.
    """

    encrypt: float
    evaluate: float
    decrypt: float
    network: float
    rest: float

    @property
    def total(self) -> float:
        """One after the other."""
        return self.encrypt + self.evaluate + self.decrypt + self.network + self.rest

    @property
    def limit(self) -> str:
        """The part that takes longest."""
        parts = dataclasses.asdict(self)
        return max(parts, key=parts.__getitem__)


@dataclasses.dataclass(frozen=True)
class Plan:
    """See ``make_plan``.

    Attributes:
        to, tokens: of the plan.
        kinds: what is outsourced.
        requests, bytes_up, bytes_down: of a step.
        bytes_without_sharing: up and down, if siblings did not share their input.
        outsourced, at_client: weights.
        client_bytes: of the weights that stay, as the model stores them.
        stays: layers that stay and why, by name.
        refused: layers, or groups of them, that the backend cannot evaluate, and why: outsourcing stops at them. The
            other figures are of the rest.
        estimate: None if nothing was measured, or there is nothing to measure.
    """

    to: str
    tokens: int
    kinds: tuple[Kind, ...]
    requests: int
    bytes_up: int
    bytes_down: int
    bytes_without_sharing: int
    outsourced: int
    at_client: int
    client_bytes: int
    stays: dict[str, str]
    refused: dict[str, str]
    estimate: Estimate | None

    @property
    def fraction(self) -> float:
        """Outsourced weights over all."""
        return self.outsourced / max(self.outsourced + self.at_client, 1)


def make_plan(
    model: str,
    to: str = "mlwe",
    *,
    tokens: int = 1024,
    layers: Sequence[str] | str | None = None,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    bandwidth: float = 125e6,
    latency: float = 1e-3,
    measure: bool = True,
) -> Plan:
    """What a training step of an outsourced model would take. No weight is loaded.

    Args:
        model: a folder with a ``config.json`` (a client's part of a bundle has one), a hub name, or ``smollm2``.
        to: selection string; its endpoints are not asked.
        tokens: of a step.
        layers: which layers; see ``ciphertune.layers.choose_layers``.
        targets: ends of names of the layers with adapters: no gradient is asked for before the first of them.
        bandwidth: bytes a second between client and workers, each way.
        latency: seconds one way.
        measure: take about a second to measure this machine, and estimate the step's time.

    Raises:
        ConfigError: the model's configuration cannot be read, or an argument is wrong.
        SelectionError, LayerError: about ``to`` and ``layers``.
    """
    if tokens < 1 or bandwidth <= 0 or latency < 0:
        raise ConfigError("tokens and bandwidth must be above 0, and latency not below")
    choice = choose(to)
    skeleton = _skeleton(model)
    chosen = choose_layers(skeleton, layers, plugin_manager(), allow_meta=True)
    infos = [_info(candidate, choice.backend) for candidate in chosen]
    groups = sibling_groups(chosen, [info.in_features for info in infos])
    singles = [(i,) for i in range(len(infos))]
    first = next((i for i, info in enumerate(infos) if info.name.endswith(tuple(targets))), len(infos))
    # Nothing is asked for the gradient of an input that comes before the first adapter.
    ahead = {i for group in groups if min(group) <= first for i in group}
    refused: dict[str, str] = {}
    taken: list[tuple[int, ...]] = []
    for group in groups if choice.options.share_inputs else singles:
        why = _refusal([infos[i] for i in group], choice.backend)
        if why is None:
            taken.append(group)
        else:
            refused[" + ".join(infos[i].name for i in group)] = why
    shared = _kinds(taken, infos, choice.backend, tokens, ahead)
    chosen = [chosen[i] for group in taken for i in group]
    alone = _kinds([(i,) for group in taken for i in group], infos, choice.backend, tokens, ahead)
    names = {candidate.name for candidate in chosen}
    outsourced = sum(kind.weights for kind in shared)
    kept = {id(p): p for p in skeleton.parameters()}
    places = collections.Counter(id(p) for module in skeleton.modules() for p in module._parameters.values())
    for candidate in chosen:
        if places[id(candidate.module.weight)] == 1:
            kept.pop(id(candidate.module.weight))
    up, down = sum(kind.bytes_up for kind in shared), sum(kind.bytes_down for kind in shared)
    requests = sum(kind.requests for kind in shared)
    network = (up + down) / bandwidth + 2 * latency * requests
    return Plan(
        to=str(choice.selection),
        tokens=tokens,
        kinds=tuple(shared),
        requests=requests,
        bytes_up=up,
        bytes_down=down,
        bytes_without_sharing=sum(kind.bytes_up + kind.bytes_down for kind in alone),
        outsourced=outsourced,
        at_client=sum(p.numel() for p in kept.values()),
        client_bytes=sum(p.nbytes for p in kept.values()),
        stays={
            c.name: c.obstacle or c.stays or "it was not chosen"
            for c in linear_layers(skeleton, allow_meta=True)
            if c.name not in {info.name for info in infos}
        },
        refused=refused,
        estimate=_estimate(choice.backend, to, shared, skeleton, names, tokens, network)
        if measure and shared
        else None,
    )


def _skeleton(model: str) -> nn.Module:
    if model == "smollm2":
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
        with torch.device("meta"):
            built: nn.Module = LlamaForCausalLM(config)
        built.tie_weights()  # type: ignore[operator]
        return built
    folder = Path(model)
    if not folder.is_dir():
        try:
            from huggingface_hub import hf_hub_download

            folder = Path(hf_hub_download(model, "config.json")).parent
        except Exception as error:
            raise ConfigError(f"{model!r} is neither a folder nor a model that the hub gives: {error}") from error
    return build(folder)


def _info(candidate: Candidate, backend: Backend) -> LayerInfo:
    """Sizes alone; norms play no part in what travels."""
    rows, columns = candidate.weight().shape
    return LayerInfo(candidate.name, columns, rows, backend.weight_bits, None, 1.0, 1.0, b"")


def _refusal(members: Sequence[LayerInfo], backend: Backend) -> str | None:
    """Why a backend cannot evaluate a group, in either direction."""
    answers = (backend.refuse(group_map(members, direction)) for direction in _DIRECTIONS)
    return next((why for why in answers if why is not None), None)


def _kinds(
    groups: Sequence[tuple[int, ...]], infos: Sequence[LayerInfo], backend: Backend, tokens: int, ahead: set[int]
) -> list[Kind]:
    kinds: dict[tuple[str, int, int], Kind] = {}
    for group in groups:
        members = [infos[i] for i in group]
        maps = {direction: group_map(members, direction) for direction in _DIRECTIONS}
        name = "+".join(info.name.rpartition(".")[2] for info in members)
        key = (name, maps["forward"].in_features, maps["forward"].out_features)
        kind = kinds.setdefault(key, Kind(*key))
        kind.count += 1
        for direction in _DIRECTIONS[:1] if group[0] in ahead else _DIRECTIONS:
            traffic = backend.traffic(maps[direction], tokens)
            if traffic is None:
                raise ConfigError(f"{backend.name!r} does not say what it sends, so it cannot be planned")
            kind.requests += 1
            kind.bytes_up += traffic[0]
            kind.bytes_down += traffic[1]
    return list(kinds.values())


def _estimate(
    backend: Backend,
    to: str,
    kinds: Sequence[Kind],
    skeleton: nn.Module,
    outsourced: set[str],
    tokens: int,
    network: float,
) -> Estimate:
    common = max(kinds, key=lambda kind: kind.weights)
    most = backend.measured_size
    t, k, n = min(tokens, most[0]), min(common.in_features, most[1]), min(common.out_features, most[2])
    local = to.partition("?")
    speed = bench_kernel(backend.name + (f"?{local[2]}" if local[2] else ""), t, k, n, repeat=3)
    measured = backend.work(LinearMap("", "forward", k, n, 1.0), t)
    whole = []
    for kind in kinds:
        forward = LinearMap("", "forward", kind.in_features, kind.out_features, 1.0)
        backward = LinearMap("", "backward", kind.out_features, kind.in_features, 1.0)
        whole.append((kind.count, backend.work(forward, tokens)))
        whole.append((kind.requests - kind.count, backend.work(backward, tokens)))

    def part(phase: str) -> float:
        amount: float = sum(number * getattr(work, phase) for number, work in whole)
        return float(speed[f"{phase}_s"]) * amount / float(getattr(measured, phase))

    plain = 2 * t * k * n / speed["plaintext_fp32_s"]
    head = sum(c.weight().numel() for c in linear_layers(skeleton, allow_meta=True) if c.name not in outsourced)
    return Estimate(
        encrypt=part("encrypt"),
        evaluate=part("evaluate"),
        decrypt=part("decrypt"),
        network=network,
        # Attention, norms and adapters take about as long again as a tenth of the plain products.
        rest=(6 * head * tokens + 0.1 * 4 * tokens * sum(kind.weights for kind in kinds)) / plain,
    )
