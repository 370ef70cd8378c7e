"""The training run that a configuration describes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shlex
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ciphertune._support.atomic import remove_directory
from ciphertune.bundle.client import is_client_folder
from ciphertune.client.choice import choose
from ciphertune.errors import ConfigError
from ciphertune.models.load import most_positions
from ciphertune.outsourcing.calibration import calibration_under
from ciphertune.outsourcing.convert import outsource, outsourced_layers, session_of, share
from ciphertune.plugins import registry
from ciphertune.plugins.blame import blamed
from ciphertune.plugins.manager import plugin_manager
from ciphertune.report.costs import CostMeter
from ciphertune.runs.adapters import adapted, check_adapters
from ciphertune.runs.classification import ClassificationTask
from ciphertune.runs.config import TrainConfig, placed
from ciphertune.runs.language import LanguageTask
from ciphertune.runs.results import OutputFolder, Progress, Result, common_figures, writable
from ciphertune.runs.sizes import evaluation_size, evaluations_told, judging_batches, steps_of, vocabulary
from ciphertune.runs.stopping import Asked, RunStopped, stopping_on_signals
from ciphertune.runs.task import Batches, RunTask
from ciphertune.training.checkpoint import list_checkpoints
from ciphertune.training.trainer import LoraTrainer

TASKS: dict[str, Callable[[TrainConfig], RunTask]] = {
    "language": LanguageTask,
    "classification": ClassificationTask,
}
"""Tasks by the name that a configuration gives them."""


@dataclasses.dataclass
class Comparison:
    """A run to draw beside this one.

    Attributes:
        to: its selection string.
        losses: its training loss of every step.
    """

    to: str
    losses: list[float]


@dataclasses.dataclass(kw_only=True)
class RunResult(Result):
    """The figures of a training run; ``result.json`` holds the same with the history and the configuration.

    Attributes:
        model: its name, without the folder that it is in.
        command: command line that does the run again; None where it was no command.
        steps: optimizer steps done, those before a resume included.
        losses: training loss of every step.
        evaluations: as in ``ciphertune.training.history.History``.
        comparison: the run drawn beside this one.
    """

    model: str
    command: list[str] | None
    steps: int
    losses: list[float]
    evaluations: list[dict[str, float]]
    comparison: Comparison | None


def run_training(
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    compare: Path | None = None,
    progress: Progress | None = None,
    command: Sequence[str] | None = None,
) -> RunResult:
    """Load a model and data, outsource the model, train its adapters, and write the results.

    Args:
        config: see ``ciphertune.runs.config``.
        resume: go on from the last checkpoint in ``training.checkpoint_dir``.
        overwrite: write over the results and checkpoints of an earlier run in the same folders.
        compare: ``result.json`` of another run, to draw its losses beside this one's.
        progress: called with a line at every stage.
        command: the command line of the run. Where it is given and there are checkpoints, Ctrl-C and SIGTERM end the
            run after its step, and what goes on with it is told by ``progress`` whenever it ends early.

    Raises:
        RunStopped: a signal ended it after a step.
        ConfigError: the model or data, or the run to compare with, cannot be loaded; a folder for results holds those
            of another run.
        SelectionError, PluginError: about ``to`` or ``plugins``.
        CipherTuneError: whatever else ``outsource`` and ``LoraTrainer`` raise.
    """
    comparison = None if compare is None else read_comparison(compare)
    with plugin_manager().using(*config.plugins), contextlib.ExitStack() as places:
        return _run(config, resume, overwrite, comparison, progress or (lambda line: None), command, places)


def _run(
    config: TrainConfig,
    resume: bool,
    overwrite: bool,
    comparison: Comparison | None,
    progress: Progress,
    command: Sequence[str] | None,
    places: contextlib.ExitStack,
) -> RunResult:
    t = config.training
    output = OutputFolder(Path(t.output))
    checkpoints = None if t.checkpoint_dir is None else Path(t.checkpoint_dir)
    if resume and checkpoints is None:
        raise ConfigError("training.checkpoint_dir is not set, so there is nothing to resume from")
    if resume and checkpoints is not None and not list_checkpoints(checkpoints):
        raise ConfigError(f"there is no checkpoint in {checkpoints}, so nothing to go on from: leave out --resume")
    choice = choose(config.to)
    with blamed(registry.TRANSPORTS, choice.selection.transport, "'check'", quote=True):
        choice.transport.check(choice.selection.endpoints)
    # Before the model, which takes minutes: places and data are looked at quickly, and may be wrong.
    if not resume and not overwrite:
        _refuse_overwriting(output, checkpoints)
    check_adapters(config)
    task = TASKS[config.task](config)
    places.enter_context(writable("training.output", output.path))
    if checkpoints is not None and checkpoints.resolve() != output.path.resolve():
        places.enter_context(writable("training.checkpoint_dir", checkpoints))
    _check_length(config.data.length, most_positions(config.model.name))
    progress(f"Loading {config.model.name} …")
    base, tokenizer = task.load()
    _check_length(config.data.length, getattr(base.config, "max_position_embeddings", None))
    name = _model_name(config.model.name, base)
    data = task.batches(tokenizer)
    _check_vocabulary(data, base, config.model.name)
    for note in data.notes:
        progress(f"Data: {note}")
    # Before the adapter: one that goes on may have been shaped by private data.
    calibration = None
    if not outsourced_layers(base):
        calibration = calibration_under(choice.backend, base, tokenizer, config.calibration, progress)
    steps = steps_of(t, len(data.train), config.data.batch_size)
    model = adapted(base, config, task, steps)
    if not outsourced_layers(base):
        outsource(
            model,
            config.to,
            config.layers,
            embeddings=config.embeddings,
            convolutions=config.convolutions,
            calibration=calibration,
        )
    session = session_of(model)
    part = share(model)
    progress(
        f"{part.layers} layers with {100 * part.fraction:.1f}% of the weights outsourced to {config.to}: "
        f"{session.security.summary}. {len(data.train)} sequences to train on, {len(data.held)} held out"
    )
    trainer = LoraTrainer(model, t, metric=task.metric)
    loader = data.loader(config.data.batch_size, t.seed)
    held = data.evaluation(evaluation_size(data.held, base, config.data.batch_size))
    if held is not None:
        told = evaluations_told(t, len(data.train), len(data.held), config.data.batch_size)
        if told is not None:
            progress(told)
    if overwrite and not resume and checkpoints is not None:
        for checkpoint in list_checkpoints(checkpoints):
            remove_directory(checkpoint)
    places.enter_context(_going_on(checkpoints, command, progress))
    torch.manual_seed(t.seed)
    meter = CostMeter(session, part)
    # Products that overlap take longer than they would alone, and tell nothing.
    judging = judging_batches(config.data.batch_size, progress) if t.interleave == 1 else contextlib.nullcontext()
    with meter.measuring(), judging, _ending_early(trainer, checkpoints, command, progress) as asked:
        history = trainer.train(loader, held, resume=resume)
    if trainer.stopped:
        session.close()
        raise RunStopped(trainer.step, trainer.total_steps, asked.signal or signal.SIGINT)
    with output.writing(checkpoints, trainer.save_adapter):
        trainer.save_adapter(output.adapter)
        if config.task == "classification":
            # The names of the labels are in no file of peft's.
            base.config.architectures = [type(base).__name__]
            base.config.save_pretrained(output.adapter)
    result = RunResult(
        **common_figures(config.to, session, part, meter, output),
        model=name,
        command=None if command is None else [*command, "--overwrite"],
        steps=trainer.step,
        losses=history.losses,
        evaluations=history.evaluations,
        comparison=comparison,
    )
    session.close()
    settings = dataclasses.asdict(placed(config, Path.cwd()))
    content = {**dataclasses.asdict(result), "history": history.steps, "config": settings}
    if history.gradient_norms:
        content["gradient_norms"] = history.gradient_norms
    with output.writing(checkpoints):
        output.write(content, {config.to: history.losses}, title=f"{name} through {config.to}")
    return result


@contextlib.contextmanager
def _going_on(checkpoints: Path | None, command: Sequence[str] | None, progress: Progress) -> Iterator[None]:
    """Say how to go on with a run that ends before its results are written."""
    try:
        yield
    except BaseException:
        kept = [] if command is None or checkpoints is None else list_checkpoints(checkpoints)
        if command is not None and kept:
            progress(f"{kept[-1].name} is kept. Go on with: {shlex.join([*command, '--resume'])}")
        raise


@contextlib.contextmanager
def _ending_early(
    trainer: LoraTrainer, checkpoints: Path | None, command: Sequence[str] | None, progress: Progress
) -> Iterator[Asked]:
    """End a run after its step where a signal asks for it."""
    if command is None or checkpoints is None:
        yield Asked()
        return
    with stopping_on_signals(trainer, progress) as asked:
        yield asked


def _model_name(given: str, model: Any) -> str:
    """What to call a model: a bundle's by the model that was split, a folder by its last part."""
    split = getattr(model.config, "_name_or_path", "") if is_client_folder(given) else ""
    return Path(split or given).name or Path(given).resolve().name


def _refuse_overwriting(output: OutputFolder, checkpoints: Path | None) -> None:
    held = [path for path in (output.result, output.adapter) if path.exists()]
    held += [] if checkpoints is None else list_checkpoints(checkpoints)[-1:]
    if held:
        further = ", or go on with it by --resume" if checkpoints is not None and list_checkpoints(checkpoints) else ""
        raise ConfigError(
            f"{held[0]} is of an earlier run: write over it with --overwrite{further}, or choose another "
            f"training.{'checkpoint_dir' if held[0].name.startswith('checkpoint-') else 'output'}"
        )


def _check_length(length: int, most: Any) -> None:
    if isinstance(most, int) and length > most:
        raise ConfigError(f"data.length is {length}, and the model takes {most} tokens at most: lower data.length")


def _check_vocabulary(data: Batches, model: Any, name: str) -> None:
    rows = vocabulary(model)
    most = max(max(sequence.ids, default=0) for sequence in (*data.train, *data.held))
    if rows is not None and most >= rows:
        raise ConfigError(
            f"the tokenizer of {name!r} gave token {most}, and the model has embeddings of {rows} tokens: they are not "
            "of one model"
        )


def read_comparison(path: Path) -> Comparison:
    """Read the losses of another run.

    Raises:
        ConfigError: it is not a ``result.json`` that ``ciphertune train`` wrote.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        losses = [float(loss) for loss in content["losses"]]
        to = str(content["to"])
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} is not a result.json of 'ciphertune train'") from error
    if not losses or not all(map(math.isfinite, losses)):
        raise ConfigError(f"{path} has no losses, or some that are not finite")
    return Comparison(to, losses)
