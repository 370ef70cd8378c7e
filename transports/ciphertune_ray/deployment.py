"""Workers of a bundle on a cluster: placed by the memory they need, spread over its nodes, started again by Ray.

A deployment is what its actors are: they carry its name, and each knows its specification, so nothing is lost with the
process that started it. This module runs in processes that import Ray: a relay, or a command.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ray
from ray.util import list_named_actors
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ciphertune.bundle.placement import Placement
from ciphertune.errors import ConfigError, TransportError
from ciphertune_ray.actors import WorkerActor
from ciphertune_ray.address import actor_name
from ciphertune_ray.bundles import Block, blocks_of, parts_of
from ciphertune_ray.scaling import Scale, Scaler

log = logging.getLogger(__name__)

NAMESPACE = "ciphertune"
_OVERHEAD = 512 << 20
"""Bytes that a worker needs beside its weights."""
_ASK_SECONDS = 10.0

Part = tuple[str, list[str], tuple[int, int]]
"""A worker's folder, the layers of it that are served (all if none are listed), and which part of their rows, of how
many."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """The specification of a deployment.

    Attributes:
        bundle: a path that all nodes share, or a URL for fsspec.
        parts: of the model; worker i holds part i modulo their number.
        cpus, gpus: of a worker.
        memory: bytes that a worker is given.
        threads: CPU threads of a product; 0 for as many as ``cpus``.
        restarts, retries: Ray's ``max_restarts`` and ``max_task_retries``.
        max_requests, max_client_mb, idle_seconds: as options of ``ciphertune worker``.
        listen: a transport over which each worker is served as well, to clients that are no part of the cluster; empty
            for none.
        port: worker i listens on ``port + i`` of its node; 0 for any free one.
        listen_options: of that transport.
        backends: those that clients may ask for; none for all that are installed.
        addresses: folder that all nodes share, where worker i writes its address as ``i.address``; empty for none.
    """

    bundle: str
    parts: tuple[Part, ...]
    cpus: float
    gpus: float
    memory: int
    threads: int
    restarts: int
    retries: int
    max_requests: int
    max_client_mb: int
    idle_seconds: float
    listen: str
    port: int
    listen_options: Mapping[str, str]
    backends: tuple[str, ...] = ()
    addresses: str = ""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The part of a specification that a user gives; ``plan`` finds out the rest.

    Attributes:
        bundle: a bundle, or a worker's folder of one.
        workers: how many in all; more than the parts of the model are replicas.
        placement: of the parts, as of ``ciphertune.bundle.placement.Placement.read``; if empty, as few parts of whole
            layers as fit the nodes' memory.
        memory: bytes that a worker may take; 0 for what a node has.
        cpus, gpus, threads, restarts, retries, max_requests, max_client_mb, idle_seconds, listen, port, listen_options,
        backends, addresses: as in ``Spec``.
    """

    bundle: str
    workers: int = 1
    placement: str = ""
    cpus: float = 1.0
    gpus: float = 0.0
    memory: int = 0
    threads: int = 0
    restarts: int = -1
    retries: int = 0
    max_requests: int = 64
    max_client_mb: int = 2048
    idle_seconds: float = 600.0
    listen: str = ""
    port: int = 5555
    listen_options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    backends: tuple[str, ...] = ()
    addresses: str = ""


def members(name: str) -> list[int]:
    """The numbers of a deployment's workers, those being started again included."""
    prefix = f"{name}/"
    found = [actor for actor in list_named_actors() if actor and actor.startswith(prefix)]
    return sorted(int(actor.removeprefix(prefix)) for actor in found if actor.removeprefix(prefix).isdecimal())


def deployments() -> list[str]:
    """The names of all deployments of the cluster."""
    return sorted({name.rpartition("/")[0] for name in list_named_actors() if name and "/" in name})


def plan(wanted: Wanted) -> Spec:
    """Make the specification of a deployment from what the user wants and what the bundle and the nodes are.

    The bundle is read on the cluster, which may see paths that this machine does not.

    Raises:
        ConfigError: it cannot be read, or does not fit the nodes.
    """
    parts, blocks = _on_cluster(_layout, wanted.bundle)
    room = wanted.memory or max((node["Resources"].get("memory", 0) for node in _nodes()), default=0)
    asked = _placement(wanted)
    if len(parts) > 1:
        if asked is not None:
            raise ConfigError(
                f"the bundle is split for {len(parts)} workers, so it cannot be placed as {wanted.placement!r}: "
                "leave placement out, or split the model for one worker"
            )
        held: list[Part] = [(part, [], (0, 1)) for part in parts]
        largest = float(max(sum(size for _, size in of) for of in blocks))
    else:
        layers = asked.layers if asked is not None else _fewest(blocks[0], room - _OVERHEAD)
        rows = asked.rows if asked is not None else 1
        cut = _cut(blocks[0], layers)
        names = [[name for of_block, _ in of for name in of_block] for of in cut]
        held = [(parts[0], of, (row, rows)) for of in names for row in range(rows)]
        largest = max(sum(size for _, size in of) for of in cut) / rows
    need = int(largest) + _OVERHEAD
    if need > room:
        raise ConfigError(
            f"a worker of {wanted.bundle} needs {need / 1e9:.2f} GB, and {room / 1e9:.2f} GB are what it may have: "
            "use more workers, or nodes with more memory"
        )
    if wanted.workers < len(held):
        raise ConfigError(f"the model is in {len(held)} parts, which {wanted.workers} workers cannot hold")
    same = {f.name: getattr(wanted, f.name) for f in dataclasses.fields(Spec) if f.name not in ("parts", "memory")}
    return Spec(parts=tuple(held), memory=wanted.memory or need, **same)


def _placement(wanted: Wanted) -> Placement | None:
    """Read the placement that was asked for; with numbers, it may be of fewer workers, and the others are replicas."""
    if not wanted.placement:
        return None
    return Placement.read(wanted.placement, None if ":" in wanted.placement else wanted.workers)


def grow(name: str, spec: Spec, count: int, *, shared: bool, seconds: float) -> list[Any]:
    """Start workers until there are ``count``, and wait until they take requests.

    Args:
        name: of the deployment.
        spec: of the workers that are started.
        count: workers in all.
        shared: they outlive whoever starts them, and others can use them.
        seconds: to wait for room in the cluster, and again for the workers.

    Returns:
        Handles of the new workers. Those that are not shared end with the last of them.

    Raises:
        ConfigError: there are fewer workers than parts, or a worker could not load its part.
        TransportError: the cluster has no room for them. None is left behind.
    """
    if count < len(spec.parts):
        raise ConfigError(f"{count} workers cannot hold the {len(spec.parts)} parts of the model: one each is needed")
    present = set(members(name))
    new = [index for index in range(count) if index not in present]
    if not new:
        return []
    group = _reserve(name, spec, new, shared, seconds)
    actors: list[Any] = []
    try:
        kind = ray.remote(WorkerActor)
        for bundle, index in enumerate(new):
            options: dict[str, Any] = {
                "name": actor_name(name, index),
                "namespace": NAMESPACE,
                "lifetime": "detached" if shared else None,
                "num_cpus": spec.cpus,
                "num_gpus": spec.gpus,
                "memory": spec.memory,
                "max_restarts": spec.restarts,
                "max_task_retries": spec.retries,
                "scheduling_strategy": PlacementGroupSchedulingStrategy(group, bundle),
            }
            actors.append(kind.options(**options).remote(dataclasses.asdict(spec), index))
        _wait(actors, seconds)
        return actors
    except BaseException:
        for actor in actors:
            ray.kill(actor)
        remove_placement_group(group)
        raise


def keep_scaled(name: str, scale: Scale, interval: float, seconds: float, stop: Callable[[], bool]) -> None:
    """Add and end workers of a deployment by the requests that wait at them, until ``stop`` says so.

    Args:
        name: of the deployment, which is there.
        scale: when; ``step`` is taken from the deployment.
        interval: seconds between looks at the workers.
        seconds: to wait for room in the cluster, and for new workers.
        stop: asked between looks.

    Raises:
        TransportError: no worker of the deployment answers.
        ConfigError: ``scale`` does not fit the parts of the model.
    """
    spec = spec_of(name)
    if spec is None:
        raise TransportError(f"the cluster has no deployment named {name!r} that answers: start it with 'ray up' first")
    scaler = Scaler(dataclasses.replace(scale, step=len(spec.parts)))
    while not stop():
        count, wanted = len(members(name)), scaler.wanted(describe(name), time.monotonic())
        if wanted != count:
            log.warning("%s: %d workers, %d from now on", name, count, wanted)
        try:
            if wanted > count:
                grow(name, spec, wanted, shared=True, seconds=seconds)
            elif wanted < count:
                shrink(name, wanted)
        except (ConfigError, TransportError) as error:
            # The cluster may have room later.
            log.warning("%s stays at %d workers: %s", name, count, error)
        time.sleep(interval)


def shrink(name: str, count: int) -> list[int]:
    """Stop workers until there are ``count``; the numbers of those. A reservation ends with its last worker."""
    gone = members(name)[count:]
    for index in gone:
        with contextlib.suppress(ValueError):  # it is gone already
            ray.kill(ray.get_actor(actor_name(name, index), NAMESPACE))
    left = set(members(name)) - set(gone)
    for group in placement_group_table().values():
        held = _indices(group.get("name", ""), name)
        if held and not held & left and group["state"] != "REMOVED":
            remove_placement_group(ray.util.get_placement_group(group["name"]))
    return gone


def describe(name: str, indices: Iterable[int] | None = None) -> list[dict[str, Any]]:
    """Ask the workers of a deployment to describe themselves; ``state`` tells of those that do not answer."""
    found: list[dict[str, Any]] = []
    asked = []
    for index in members(name) if indices is None else indices:
        try:
            actor = ray.get_actor(actor_name(name, index), NAMESPACE)
        except ValueError:
            continue
        asked.append((index, actor.describe.remote()))
    ray.wait([answer for _, answer in asked], num_returns=len(asked), timeout=_ASK_SECONDS) if asked else None
    for index, answer in asked:
        try:
            found.append({**ray.get(answer, timeout=0), "index": index, "state": "up"})
        except ray.exceptions.GetTimeoutError:
            found.append({"index": index, "state": "starting"})
        except ray.exceptions.RayError:
            found.append({"index": index, "state": "starting again"})
    return found


def spec_of(name: str) -> Spec | None:
    """The specification of a deployment, from a worker that answers; None where there is no such worker."""
    for worker in describe(name):
        if "spec" in worker:
            return read_spec(worker["spec"])
    return None


def read_spec(plain: Mapping[str, Any]) -> Spec:
    """A specification from plain data."""
    parts = tuple(
        (str(part), [str(layer) for layer in layers], (int(row), int(rows)))
        for part, layers, (row, rows) in plain["parts"]
    )
    return Spec(**{**plain, "parts": parts})


def _layout(bundle: str) -> tuple[list[str], list[list[Block]]] | str:
    # An error comes back as text: what is raised in a task arrives wrapped in Ray's own.
    try:
        parts = parts_of(bundle)
        return parts, [blocks_of(part) for part in parts]
    except ConfigError as error:
        return str(error)


def _on_cluster(function: Any, *arguments: Any) -> Any:
    try:
        found = ray.get(ray.remote(function).options(num_cpus=0).remote(*arguments), timeout=120)
    except ray.exceptions.RayError as error:
        raise TransportError(f"the cluster did not answer: {type(error).__name__}") from error
    if isinstance(found, str):
        raise ConfigError(found)
    return found


def _nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _fewest(blocks: Sequence[Block], room: float) -> int:
    """The smallest number of parts each of which fits."""
    for count in range(1, len(blocks) + 1):
        if max(sum(size for _, size in of) for of in _cut(blocks, count)) <= room:
            return count
    return len(blocks)


def _cut(blocks: Sequence[Block], count: int) -> list[list[Block]]:
    """Cut blocks into ``count`` runs of about equal bytes.

    >>> _cut([(["a"], 5), (["b"], 1), (["c"], 4)], 2)
    [[(['a'], 5)], [(['b'], 1), (['c'], 4)]]
    """
    if not 1 <= count <= len(blocks):
        raise ConfigError(f"a bundle of {len(blocks)} blocks cannot be {count} parts")
    total = sum(size for _, size in blocks) or 1
    runs: list[list[Block]] = [[]]
    done = 0.0
    for position, block in enumerate(blocks):
        behind = len(blocks) - position
        full = done + block[1] / 2 > total * len(runs) / count
        if runs[-1] and len(runs) < count and (full or behind <= count - len(runs)):
            runs.append([])
        runs[-1].append(block)
        done += block[1]
    return runs


def _reserve(name: str, spec: Spec, new: Sequence[int], shared: bool, seconds: float) -> PlacementGroup:
    need = {"CPU": spec.cpus, "GPU": spec.gpus, "memory": float(spec.memory)}
    need = {kind: amount for kind, amount in need.items() if amount}
    group = placement_group(
        [dict(need) for _ in new],
        strategy="SPREAD",
        name=f"{name}:{','.join(map(str, new))}:{time.time_ns():x}",
        lifetime="detached" if shared else None,
    )
    try:
        if group.wait(seconds):
            return group
        free = ray.available_resources()
        wanted = ", ".join(f"{_amount(kind, amount)}" for kind, amount in need.items())
        has = ", ".join(f"{_amount(kind, free.get(kind, 0.0))}" for kind in need)
        raise TransportError(
            f"the cluster has had no room for {len(new)} workers of {wanted} each within {seconds:g} s; free: {has}"
        )
    except BaseException:
        remove_placement_group(group)
        raise


def _amount(kind: str, amount: float) -> str:
    return f"{amount / 1e9:.2f} GB" if kind == "memory" else f"{amount:g} {kind}"


def _indices(group: str, name: str) -> set[int]:
    """The workers that a reservation is for, if it is one of this deployment's."""
    owner, _, rest = group.partition(":")
    return {int(index) for index in rest.partition(":")[0].split(",")} if owner == name and rest else set()


def _wait(actors: Sequence[Any], seconds: float) -> None:
    try:
        ray.get([actor.describe.remote() for actor in actors], timeout=seconds)
    except ray.exceptions.GetTimeoutError:
        raise TransportError(f"the workers have not loaded their weights within {seconds:g} s") from None
    except ray.exceptions.RayError as error:
        raise ConfigError(f"a worker could not start: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    """The last line of Ray's report on an actor's end that names an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "Error" in line.partition(":")[0]]
    return (told or lines or [type(error).__name__])[-1]
