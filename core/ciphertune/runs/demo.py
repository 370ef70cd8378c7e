"""The demo: the same fine-tuning in the clear and encrypted, side by side."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ciphertune.errors import ConfigError
from ciphertune.outsourcing.convert import outsource, session_of, share
from ciphertune.report.costs import CostMeter
from ciphertune.runs.results import OutputFolder, Progress, Result, common_figures, writable
from ciphertune.training.trainer import LoraTrainer
from ciphertune.workloads.local_worker import serving
from ciphertune.workloads.named import load_workload
from ciphertune.workloads.workload import Workload


@dataclasses.dataclass
class Run:
    """One of the two fine-tunings.

    Attributes:
        losses: training loss of every optimizer step.
        seconds, learning_rates: of every optimizer step.
        units_per_second: tokens or samples trained on in a second, over all steps.
        held_out: the workload's metric on held-out data after training.
        held_out_loss: loss on held-out data after training.
    """

    losses: list[float]
    seconds: list[float]
    learning_rates: list[float]
    units_per_second: float
    held_out: float
    held_out_loss: float


@dataclasses.dataclass(kw_only=True)
class DemoResult(Result):
    """The figures of the demo; ``result.json`` holds the same.

    Attributes:
        model: name of the model.
        data: what it was trained on.
        metric: name of the metric on held-out data.
        unit: ``tokens`` or ``samples``.
        quick: whether it was the small network.
        steps: optimizer steps of each run.
        per_step: tokens or samples of a step.
        seed: of both runs.
        held_out_before: the metric before training, in the clear.
        plaintext, encrypted: the two runs.
        question: that the model was asked; None for one that answers none.
        answer_before, answer_after: beginnings of its answers: before training in the clear, and after it outsourced.
        outsourced_layers: number of outsourced layers.
        crossed: what left the client, in words.
        stayed: what did not.
        seconds: of the whole demo.
    """

    model: str
    data: str
    metric: str
    unit: str
    quick: bool
    steps: int
    per_step: int
    seed: int
    held_out_before: float
    plaintext: Run
    encrypted: Run
    question: str | None
    answer_before: str | None
    answer_after: str | None
    outsourced_layers: int
    crossed: list[str]
    stayed: list[str]
    seconds: float


def run_demo(
    output: Path,
    *,
    to: str = "mlwe",
    quick: bool = False,
    steps: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> DemoResult:
    """Fine-tune in the clear and under ``to``, from the same adapters and on the same batches, and compare.

    Args:
        output: folder for the adapter, the plot, ``report.html`` and ``result.json``; made if missing.
        to: selection string; with a remote transport and no endpoint, such as ``mlwe+zmq://``, a worker is started for
            the time it takes.
        quick: a small network on digits instead of a language model.
        steps: optimizer steps of each run; 6, or 80 for the quick one.
        seed: of adapters and data.
        overwrite: write over the results of a training run; those of a demo are replaced anyway.
        progress: called with a line at every stage.

    Raises:
        ConfigError: a package is missing, an argument is wrong, or ``output`` holds a training run.
        SelectionError, PluginError, SecurityError: about ``to``.
    """
    steps = steps if steps is not None else (80 if quick else 6)
    if steps < 1:
        raise ConfigError(f"steps must be 1 or more, not {steps}")
    with writable("--output", output):
        files = OutputFolder(output)
        if not overwrite:
            _refuse_overwriting(files)
        return _both(files, to, quick, steps, seed, progress or (lambda line: None))


def _both(files: OutputFolder, to: str, quick: bool, steps: int, seed: int, progress: Progress) -> DemoResult:
    begin = time.perf_counter()
    per_step = 128 if quick else 512
    progress("Loading the model and the data …")
    work = load_workload(
        "mlp" if quick else "smollm2", batches=steps, tokens=per_step, held_out=4 if quick else 3, seed=seed
    )
    fresh = {name: p.detach().clone() for name, p in work.model.named_parameters() if p.requires_grad}
    metric_name, metric = work.metric
    trainer = _trainer(work, work.model, clear=True)
    before = metric(work.model, work.held_out, trainer.evaluate(work.held_out))
    progress(f"Held-out {metric_name} before training: {before:.2f}. Fine-tuning in the clear, for comparison …")
    answer_before = work.question.ask(work.model) if work.question else None
    plaintext = _run(work, work.model, trainer, seed)
    with torch.no_grad():
        for name, parameter in work.model.named_parameters():
            if name in fresh:
                parameter.copy_(fresh[name])
    with serving("mlp" if quick else "smollm2", to) as served:
        model = outsource(work.model, served)
        session = session_of(model)
        part = share(model)
        progress(f"Fine-tuning with {part.layers} layers outsourced to {to}: {session.security.summary} …")
        try:
            trainer = _trainer(work, model, clear=False)
            meter = CostMeter(session, part)
            with meter.measuring():
                encrypted = _run(work, model, trainer, seed)
            if work.question:
                progress(f"Asking it: {work.question.text} …")
            answer_after = work.question.ask(model) if work.question else None
        finally:
            session.close()
    trainer.save_adapter(files.adapter)
    crossed, stayed = _boundary(session.security.encrypted, part.fraction)
    result = DemoResult(
        **common_figures(to, session, part, meter, files),
        model=work.name,
        data=work.data,
        metric=metric_name,
        unit=work.unit,
        quick=quick,
        steps=steps,
        per_step=per_step,
        seed=seed,
        held_out_before=before,
        plaintext=plaintext,
        encrypted=encrypted,
        question=work.question.text if work.question else None,
        answer_before=answer_before,
        answer_after=answer_after,
        outsourced_layers=part.layers,
        crossed=crossed,
        stayed=stayed,
        seconds=time.perf_counter() - begin,
    )
    own = f"encrypted ({to})" if session.security.encrypted else to
    files.write(
        dataclasses.asdict(result),
        {"in the clear": plaintext.losses, own: encrypted.losses},
        title=f"{work.name}: fine-tuning in the clear and through {to}",
    )
    return result


def _refuse_overwriting(files: OutputFolder) -> None:
    """Refuse a folder with results that are not a demo's."""
    try:
        demos = "plaintext" in json.loads(files.result.read_text(encoding="utf-8"))
    except FileNotFoundError:
        demos = not files.adapter.exists()
    except (OSError, ValueError, TypeError, RecursionError):
        demos = False
    if not demos:
        raise ConfigError(
            f"{files.path} holds a training run: choose another --output, or write over it with --overwrite"
        )


def _trainer(work: Workload, model: nn.Module, *, clear: bool) -> LoraTrainer:
    return LoraTrainer(model, loss_fn=work.loss_fn, learning_rate=work.learning_rate, require_outsourced=not clear)


def _run(work: Workload, model: nn.Module, trainer: LoraTrainer, seed: int) -> Run:
    torch.manual_seed(seed)
    trainer.train(work.train)
    metrics = trainer.evaluate(work.held_out)
    entries = trainer.history.steps
    seconds = [entry["seconds"] for entry in entries]
    return Run(
        losses=trainer.history.losses,
        seconds=seconds,
        learning_rates=[entry["learning_rate"] for entry in entries],
        units_per_second=sum(entry[work.unit] for entry in entries) / sum(seconds),
        held_out=work.metric[1](model, work.held_out, metrics),
        held_out_loss=metrics["eval_loss"],
    )


def _boundary(encrypted: bool, fraction: float) -> tuple[list[str], list[str]]:
    """Lists of what left the client and of what stayed there, in words."""
    form = "encrypted" if encrypted else "IN THE CLEAR"
    crossed = [
        f"inputs of the outsourced layers, {form}, and gradients at their outputs, {form}",
        "layer names, numbers of tokens, order and times of calls",
    ]
    stayed: Sequence[str] = (
        "text or samples, tokens and labels",
        "embeddings, norms, attention, loss, optimizer",
        "LoRA adapters and their gradients",
        f"{100 * (1 - fraction):.1f}% of the weights",
    )
    if encrypted:
        stayed = (*stayed, "the secrets of the encryption")
    return crossed, list(stayed)
