"""A plan of a whole run: what its file says of steps and data, and the sums over all of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from ciphertune.data.render import use_template
from ciphertune.models.load import load_tokenizer
from ciphertune.planning.plan import Plan
from ciphertune.runs.adapters import adapted_layers, check_adapters, first_adapted_block
from ciphertune.runs.config import TrainConfig
from ciphertune.runs.sizes import steps_of
from ciphertune.runs.train import TASKS

_EVALUATION_TOKENS = 2048


@dataclasses.dataclass(frozen=True)
class Run:
    """What a configuration asks for.

    Attributes:
        steps: optimizer steps.
        tokens: of a step, on average.
        micro_batches, interleave: as of ``make_plan``.
        length: tokens of a sequence, on average.
        targets: ends of names of the layers with adapters.
        first_block: number of the first transformer block with adapters.
        evaluations: number of them.
        held: sequences held out.
        evaluation: tokens of each batch of one evaluation.
        per_epoch: steps of an epoch.
        all_tokens: of the data, held-out ones included.
        frozen_cache: bytes for what the blocks below the first adapter give.
    """

    steps: int
    tokens: int
    micro_batches: int
    interleave: int
    length: int
    targets: tuple[str, ...]
    first_block: int
    evaluations: int
    held: int
    evaluation: tuple[int, ...]
    per_epoch: int
    all_tokens: int
    frozen_cache: int


@dataclasses.dataclass(frozen=True)
class RunTotals:
    """Sums over a run.

    Attributes:
        bytes_up, bytes_down: of all steps and evaluations, and of the set-up where codes are read from workers.
        seconds: of the same; None without an estimate.
        evaluation_seconds: of them, those of evaluations.
    """

    bytes_up: int
    bytes_down: int
    seconds: float | None
    evaluation_seconds: float | None


def read_run(config: TrainConfig) -> Run:
    """Read the data of a run, and count steps and tokens. No weight is read.

    Raises:
        ConfigError: the data or the tokenizer cannot be read, or the adapter cannot be trained.
    """
    check_adapters(config)
    task = TASKS[config.task](config)
    tokenizer = load_tokenizer(config.model.name, config.model.gguf_file)
    if config.task == "language":
        use_template(tokenizer, config.data.chat_template_path)
    data, t, size = task.batches(tokenizer), config.training, config.data.batch_size
    per_epoch = math.ceil(math.ceil(len(data.train) / size) / t.accumulation)
    steps = steps_of(t, len(data.train), size)
    length = _mean([len(sequence.ids) for sequence in data.train])
    in_step = min(size * t.accumulation, len(data.train))
    held = sum(len(sequence.ids) for sequence in data.held)
    whole, rest = divmod(held, _EVALUATION_TOKENS)
    return Run(
        steps=steps,
        tokens=max(1, round(length * in_step)),
        micro_batches=min(t.accumulation, math.ceil(in_step / size)),
        interleave=min(t.interleave, math.ceil(in_step / size)),
        length=max(1, round(length)),
        targets=adapted_layers(config),
        first_block=first_adapted_block(config),
        evaluations=(math.ceil(steps / (t.eval_every or per_epoch)) + t.eval_on_start) if data.held else 0,
        held=len(data.held),
        evaluation=(*[_EVALUATION_TOKENS] * whole, *([rest] if rest else [])),
        per_epoch=per_epoch,
        all_tokens=held + sum(len(sequence.ids) for sequence in data.train),
        frozen_cache=t.frozen_cache << 20,
    )


def totals(plan: Plan, run: Run) -> RunTotals:
    """Sums over a run, of the plan of its step."""
    each, later = plan.evaluation, plan.later
    # Steps and evaluations of examples that came before, as far as what is kept of them fits.
    again = judged = 0.0
    if later is not None and run.frozen_cache:
        fits = min(1.0, run.frozen_cache / max(1, later.kept_bytes * run.all_tokens))
        again = fits * max(0, run.steps - run.per_epoch)
        judged = fits * max(0, run.evaluations - 1)

    def whole(step: float, after: float, evaluation: float, evaluation_after: float) -> float:
        return (run.steps - again) * step + again * after + evaluated(evaluation, evaluation_after)

    def evaluated(evaluation: float, after: float) -> float:
        return (run.evaluations - judged) * evaluation + judged * after

    once = (each.bytes_up, each.bytes_down, each.seconds or 0.0) if each else (0, 0, 0.0)
    less = later.evaluation if later is not None else None
    once_more = (less.bytes_up, less.bytes_down, less.seconds or 0.0) if less else once
    up = whole(plan.bytes_up, later.bytes_up if later else 0, once[0], once_more[0])
    down = whole(plan.bytes_down, later.bytes_down if later else 0, once[1], once_more[1])
    seconds = evaluating = None
    if plan.estimate is not None:
        evaluating = evaluated(once[2], once_more[2])
        after = later.seconds if later is not None and later.seconds is not None else 0.0
        seconds = whole(plan.estimate.total, after, once[2], once_more[2]) + (plan.set_up_seconds or 0.0)
    return RunTotals(round(up), round(down) + plan.set_up_bytes, seconds, evaluating)


def _mean(values: Sequence[int]) -> float:
    return sum(values) / max(1, len(values))
