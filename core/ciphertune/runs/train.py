"""The training run that a configuration describes."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ciphertune.bundle.client import is_client_folder, load_client
from ciphertune.data.read import read_texts
from ciphertune.errors import ConfigError
from ciphertune.models.causal import refuse_encoder
from ciphertune.models.load import load_named_model, load_tokenizer
from ciphertune.outsourcing.convert import outsource, session_of, share
from ciphertune.plugins.manager import plugin_manager
from ciphertune.report.costs import CostMeter
from ciphertune.runs.config import DataSection, TrainConfig
from ciphertune.runs.results import OutputFolder, Progress, Result, check_writable, common_figures
from ciphertune.training.trainer import LoraTrainer
from ciphertune.workloads.language import add_lora
from ciphertune.workloads.texts import batches_of, language_reference, rows_of, split_texts


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
        steps: optimizer steps done, those before a resume included.
        losses: training loss of every step.
        evaluations: as in ``ciphertune.training.history.History``.
        comparison: the run drawn beside this one.
    """

    steps: int
    losses: list[float]
    evaluations: list[dict[str, float]]
    comparison: Comparison | None


def run_training(
    config: TrainConfig,
    *,
    resume: bool = False,
    compare: Path | None = None,
    progress: Progress | None = None,
) -> RunResult:
    """Load a model and data, outsource the model, train its adapters, and write the results.

    Args:
        config: see ``ciphertune.runs.config``.
        resume: go on from the last checkpoint in ``training.checkpoint_dir``.
        compare: ``result.json`` of another run, to draw its losses beside this one's.
        progress: called with a line at every stage.

    Raises:
        ConfigError: the model or data, or the run to compare with, cannot be loaded.
        SelectionError, PluginError: about ``to`` or ``plugins``.
        CipherTuneError: whatever else ``outsource`` and ``LoraTrainer`` raise.
    """
    comparison = None if compare is None else read_comparison(compare)
    with plugin_manager().using(*config.plugins):
        return _run(config, resume, comparison, progress or (lambda line: None))


def _run(config: TrainConfig, resume: bool, comparison: Comparison | None, progress: Progress) -> RunResult:
    t = config.training
    if resume and t.checkpoint_dir is None:
        raise ConfigError("training.checkpoint_dir is not set, so there is nothing to resume from")
    # Before the model, which takes minutes: texts are read quickly, and may be wrong.
    texts = texts_of(config.data)
    output = OutputFolder(Path(t.output))
    for name, folder in (("output", output.path), ("checkpoint_dir", t.checkpoint_dir)):
        if folder is not None:
            check_writable(f"training.{name}", Path(folder))
    progress(f"Loading {config.model.name} …")
    client = is_client_folder(config.model.name)
    if client and config.layers is not None:
        raise ConfigError("layers were chosen when the model was split: leave 'layers' out")
    if not client and config.model.weights is not None:
        raise ConfigError(f"model.weights is for the client's part of a bundle, and {config.model.name} is none")
    if client:
        base = load_client(config.model.name, config.to, weights=config.model.weights)
        tokenizer = load_tokenizer(config.model.name)
    else:
        base, tokenizer = load_named_model(config.model.name, config.model.gguf_file)
    refuse_encoder(base, config.model.name, outsourced=client)
    _check_length(config.data.length, base)
    base.config.use_cache = False
    train, held = split_rows(texts, tokenizer, config.data)
    lora = config.lora
    model = add_lora(
        base,
        seed=t.seed,
        rank=lora.r,
        targets=list(lora.target_modules),
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
    )
    if not client:
        outsource(model, config.to, config.layers)
    session = session_of(model)
    part = share(model)
    progress(
        f"{part.layers} layers with {100 * part.fraction:.1f}% of the weights outsourced to {config.to}: "
        f"{session.security.summary}. {len(train)} sequences to train on, {len(held)} held out"
    )
    trainer = LoraTrainer(model, t)
    generator = torch.Generator().manual_seed(t.seed)
    sequences: Any = train
    loader: DataLoader[Any] = DataLoader(
        sequences, batch_size=config.data.batch_size, shuffle=True, generator=generator, collate_fn=_collate
    )
    torch.manual_seed(t.seed)
    meter = CostMeter(session, part)
    with meter.measuring():
        history = trainer.train(loader, batches_of(held, config.data.batch_size) if len(held) else None, resume=resume)
    with output.writing():
        trainer.save_adapter(output.adapter)
    result = RunResult(
        **common_figures(config.to, session, part, meter, output),
        steps=trainer.step,
        losses=history.losses,
        evaluations=history.evaluations,
        comparison=comparison,
    )
    session.close()
    content = {**dataclasses.asdict(result), "history": history.steps, "config": dataclasses.asdict(config)}
    with output.writing():
        output.write(content, {config.to: history.losses}, title=f"{config.model.name} through {config.to}")
    return result


def _check_length(length: int, model: Any) -> None:
    most = getattr(model.config, "max_position_embeddings", None)
    if isinstance(most, int) and length > most:
        raise ConfigError(f"data.length is {length}, and the model takes {most} tokens at most: lower data.length")


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
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a result.json of 'ciphertune train'") from error
    if not losses or not all(map(math.isfinite, losses)):
        raise ConfigError(f"{path} has no losses, or some that are not finite")
    return Comparison(to, losses)


def texts_of(data: DataSection) -> list[str]:
    """Read the texts of a data source, built-in or as ``read_texts`` reads them. Raises ``ConfigError``."""
    if data.source == "language-reference":
        return list(language_reference().values())
    return read_texts(data.source, data.text_field)


def split_rows(texts: list[str], tokenizer: Any, data: DataSection) -> tuple[Tensor, Tensor]:
    """Cut texts into sequences to train on and to hold out, (rows, length) int64 each.

    Where there are several texts, whole texts are held out.

    Raises:
        ConfigError: the text does not fill one sequence.
    """
    empty = torch.empty(0, data.length, dtype=torch.int64)
    if data.held_out == 0:
        train, held = rows_of(texts, tokenizer, data.length), empty
    elif len(texts) > 1:
        train, held = (rows_of(part, tokenizer, data.length) for part in split_texts(texts, data.held_out))
    else:
        rows = rows_of(texts, tokenizer, data.length)
        cut = len(rows) - round(len(rows) * data.held_out)
        train, held = rows[:cut], rows[cut:]
    if len(train) == 0 and len(held) > 0:
        raise ConfigError("data.held_out leaves no sequence to train on: lower it, or data.length")
    if len(train) == 0:
        raise ConfigError(f"the text does not fill one sequence of {data.length} tokens: lower data.length")
    return train, held


def _collate(rows: list[Tensor]) -> dict[str, Tensor]:
    return batches_of(torch.stack(rows), len(rows))[0]
