"""Measurement of what a client computes itself in a training step, with two blocks whose products cost nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ciphertune.backend import DIRECTIONS, Direction
from ciphertune.linear import OutsourcedLinear
from ciphertune.outsourcing.convert import put_experts
from ciphertune.outsourcing.group import LayerGroup
from ciphertune.outsourcing.layers import Candidate, group_name, sibling_groups
from ciphertune.planning.speeds import ClientCompute, Line, product_name
from ciphertune.selection import SessionOptions
from ciphertune.training.lora import add_lora
from ciphertune.weights import LayerInfo

BLOCKS = 2
"""Blocks of the model that is run."""
MOST_TOKENS = 1024
"""Tokens of the longest step that is run; longer ones are on the line through it and a quarter of it."""
_ROUNDS = 3


class Mark(NamedTuple):
    """A product that was asked for in the pass of this direction, and the client's seconds since the one before."""

    layers: str
    direction: Direction
    seconds: float


class InstantSession:
    """Stand-in for a session that answers every product at once and notes the time between products.

    Args:
        members: layers of each group.
        names: of the groups.
        transposed: numbers of the groups whose products of the forward pass have the direction backward.
    """

    def __init__(
        self, members: Sequence[Sequence[LayerInfo]], names: Sequence[str], transposed: Collection[int] = ()
    ) -> None:
        self._members = members
        self._names = names
        self._transposed = transposed
        self.marks: list[Mark] = []
        self._since = time.perf_counter()

    def begin(self) -> None:
        """Forget what was noted; a step begins."""
        self.marks = []
        self._since = time.perf_counter()

    def end(self) -> float:
        """Seconds since the last product."""
        return time.perf_counter() - self._since

    def members(self, group: int) -> Sequence[LayerInfo]:
        """See ``Session.members``."""
        return self._members[group]

    def product(
        self, group: int, direction: Direction, x: Tensor, owners: object = None, *, finite: bool = False
    ) -> Tensor:
        """See ``Session.product``; a session checks what it sends, too."""
        if not finite:
            torch.isfinite(x.sum()).item()
        of_pass: Direction = direction
        if group in self._transposed:
            of_pass = "backward" if direction == "forward" else "forward"
        self.marks.append(Mark(self._names[group], of_pass, self.end()))
        members = self._members[group]
        width = sum(m.out_features for m in members) if direction == "forward" else members[0].in_features
        # Written to, so that its memory is there when the model reads it, as that of a decrypted product is.
        answer = torch.empty(len(x), width).fill_(0.01)
        self._since = time.perf_counter()
        return answer


def measure_client_compute(
    model: nn.Module,
    chosen: Sequence[Candidate],
    options: SessionOptions,
    targets: Sequence[str],
    tokens: int,
    length: int,
) -> ClientCompute:
    """Measure what a client computes itself, by running steps of a small model.

    Args:
        model: a causal language model of ``BLOCKS`` blocks, its parameters on the meta device; it is changed.
        chosen: its layers that are outsourced.
        options: of the session.
        targets: ends of the names of layers that get LoRA adapters of rank 8; the empty end for all.
        tokens: of a micro-batch.
        length: tokens of a sequence.

    Returns:
        Seconds of a step's parts; ``head`` and ``end`` those of this small model.
    """
    session = attach_instant_session(model, chosen, options)
    adapted: Any = add_lora(model, seed=0, rank=8, targets="all-linear" if "" in targets else list(targets)).train()
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    most = min(tokens, MOST_TOKENS)
    runs = []
    for count in (max(1, most // 4), most):
        batch = _batch(adapted.config.vocab_size, count, length)
        passes = [_pass(adapted, batch, session) for _ in range(_ROUNDS + 1)][1:]
        runs.append((batch["input_ids"].numel(), passes))
    seconds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - start)

    def line(pick: Callable[[_Pass], float]) -> Line:
        (few, low), (many, high) = ((count, statistics.median(pick(one) for one in passes)) for count, passes in runs)
        slope = max(0.0, (high - low) / (many - few)) if many > few else 0.0
        return Line(max(0.0, high - slope * many), slope)

    def before(layers: str, direction: Direction) -> Line:
        return line(lambda one: one.between(layers, direction))

    kinds = {(m.layers, m.direction) for _, passes in runs for m in passes[0].marks}
    return ClientCompute(
        measured=True,
        before={product_name(*kind): before(*kind) for kind in sorted(kinds)},
        begin=line(lambda one: one.marks[0].seconds),
        head=line(lambda one: next((m.seconds for m in one.marks if m.direction == "backward"), one.end)),
        end=line(lambda one: one.end),
        optimizer=statistics.median(seconds),
    )


class _Pass(NamedTuple):
    marks: list[Mark]
    end: float

    def between(self, layers: str, direction: Direction) -> float:
        """Median time before products of a kind, but for the first of each direction: begin and head are there."""
        firsts = {next((i for i, m in enumerate(self.marks) if m.direction == d), -1) for d in DIRECTIONS}
        alike = [i for i, m in enumerate(self.marks) if (m.layers, m.direction) == (layers, direction)]
        rest = [i for i in alike if i not in firsts]
        return statistics.median(self.marks[i].seconds for i in rest) if rest else 0.0


def _pass(model: nn.Module, batch: dict[str, Tensor], session: InstantSession) -> _Pass:
    session.begin()
    model(**batch).loss.backward()
    return _Pass(session.marks, session.end())


def _batch(vocabulary: int, tokens: int, length: int) -> dict[str, Tensor]:
    ids = torch.randint(vocabulary, (max(1, tokens // length), min(tokens, length)))
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def attach_instant_session(model: nn.Module, chosen: Sequence[Candidate], options: SessionOptions) -> InstantSession:
    """Outsource layers to an ``InstantSession``, and fill what is left of a model on the meta device with zeros."""
    infos = [_info(candidate) for candidate in chosen]
    sizes = [info.in_features for info in infos]
    groups = sibling_groups(chosen, sizes, share=options.share_inputs, experts=options.experts)
    members = [[infos[i] for i in group] for group in groups]
    names = [group_name([info.name for info in of]) for of in members]
    leading_back = [number for number, group in enumerate(groups) if _leads_back(chosen[group[0]])]
    session = InstantSession(members, names, leading_back)
    like = torch.empty(0, dtype=chosen[0].weight().dtype)
    for index, group in enumerate(groups):
        if chosen[group[0]].part is not None:
            continue
        handle = LayerGroup(cast(Any, session), index, [index] * len(group))
        for member, index in enumerate(group):
            candidate = chosen[index]
            bias = candidate.module._parameters.get("bias")
            new = OutsourcedLinear(infos[index], bias, handle, member, like)
            setattr(candidate.parent, candidate.attribute, new)
    numbers = {group: number for number, group in enumerate(groups)}
    put_experts(chosen, infos, numbers, cast(Any, session), torch.device("cpu"))
    filled: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in filled:
                    zeros = torch.zeros(parameter.shape, dtype=parameter.dtype)
                    filled[id(parameter)] = nn.Parameter(zeros, requires_grad=parameter.requires_grad)
                module._parameters[name] = filled[id(parameter)]
    return session


def _leads_back(candidate: Candidate) -> bool:
    return candidate.part is not None and candidate.part.side == "outputs"


def _info(candidate: Candidate) -> LayerInfo:
    rows, columns = candidate.weight().shape
    return LayerInfo(candidate.name, columns, rows, 8, torch.ones(rows), 1.0, 1.0, b"")
