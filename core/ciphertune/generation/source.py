"""Which model is to be used: named by itself, or by the configuration file of the run that trained it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ciphertune.errors import ConfigError
from ciphertune.runs.config import DataSection, TrainConfig, load_config
from ciphertune.runs.results import OutputFolder
from ciphertune.runs.trl import is_trl, load_trl

DEFAULT_TO = "mlwe"


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """What to open.

    Attributes:
        name: the built-in ``smollm2``, a folder or hub name for transformers, or the client's part of a bundle.
        to: selection string.
        adapter: folder of a LoRA adapter of the model; None for the model as it is.
        gguf_file: file within the folder, for models in GGUF form.
        weights: for the client's part of a bundle: a worker's folder to read codes in.
        layers: names or patterns of the layers to outsource; the default choice if None.
        embeddings: whether the token embedding is at the workers, too.
        convolutions: as in a run's file.
        calibration: as in a run's file: public text by which channels are kept here, or ``off``.
        plugins: hook plugins, each ``name[?option=value&…]``.
        chat_template_path: a Jinja file in place of the tokenizer's chat template.
        data: of a run's file, the section on its data.
    """

    name: str
    to: str = DEFAULT_TO
    adapter: str | None = None
    gguf_file: str | None = None
    weights: str | None = None
    layers: tuple[str, ...] | None = None
    embeddings: bool = False
    convolutions: bool | tuple[str, ...] = False
    calibration: str | None = None
    plugins: tuple[str, ...] = ()
    chat_template_path: str | None = None
    data: DataSection | None = None


def find_source(
    model: str,
    *,
    to: str | None = None,
    adapter: str | None = None,
    no_adapter: bool = False,
    gguf_file: str | None = None,
    weights: str | None = None,
    layers: Sequence[str] | None = None,
    embeddings: bool = False,
    calibration: str | None = None,
    plugins: Sequence[str] = (),
    chat_template_path: str | None = None,
) -> ModelSource:
    """What a command line asks to open. Options go before what a configuration file says.

    Args:
        model: as ``ModelSource.name``; or a run's configuration file, TOML or TRL's YAML, which stands for its model
            with the adapter in its output folder.
        to: selection string; the file's if not given, else ``mlwe``.
        adapter: folder of an adapter, in place of the run's.
        no_adapter: use the model as it was before the run.
        gguf_file: as in ``ModelSource``.
        weights: as in ``ModelSource``.
        layers: as in ``ModelSource``.
        embeddings: as in ``ModelSource``, or the file's.
        calibration: as in ``ModelSource``.
        plugins: beside those that the file names.
        chat_template_path: as in ``ModelSource``.

    Raises:
        ConfigError: the file cannot be read or is of another task; the run wrote no adapter yet.
        SelectionError, PluginError: about the file's plugins.
    """
    if adapter is not None and no_adapter:
        raise ConfigError("--adapter and --no-adapter exclude each other: leave one out")
    path = Path(model)
    found = ModelSource(model)
    if path.suffix.lower() == ".toml" or is_trl(path):
        found = _of_run(load_trl(path) if is_trl(path) else load_config(path), adapter is None and not no_adapter)
    return dataclasses.replace(
        found,
        to=to or found.to,
        adapter=adapter or found.adapter,
        gguf_file=gguf_file or found.gguf_file,
        weights=weights or found.weights,
        layers=tuple(layers) if layers else found.layers,
        embeddings=embeddings or found.embeddings,
        calibration=calibration or found.calibration,
        plugins=(*found.plugins, *plugins),
        chat_template_path=chat_template_path or found.chat_template_path,
    )


def _of_run(config: TrainConfig, adapted: bool) -> ModelSource:
    if config.task != "language":
        raise ConfigError(f"the run's file is for the task {config.task!r}: only language models give texts")
    adapter = OutputFolder(Path(config.training.output)).adapter
    if adapted and not adapter.is_dir():
        raise ConfigError(
            f"the run has written no adapter: {adapter} does not exist. Run 'ciphertune train' first, or use the model "
            "as it is by --no-adapter"
        )
    return ModelSource(
        config.model.name,
        to=config.to,
        adapter=str(adapter) if adapted else None,
        gguf_file=config.model.gguf_file,
        weights=config.model.weights,
        layers=config.layers,
        embeddings=config.embeddings,
        convolutions=config.convolutions,
        calibration=config.calibration,
        plugins=config.plugins,
        chat_template_path=config.data.chat_template_path,
        data=config.data,
    )
