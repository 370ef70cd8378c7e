"""Sources of the weights of a model to split: a module in memory, or a checkpoint read tensor by tensor."""

from __future__ import annotations

import abc
import contextlib
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ciphertune._support.optional_imports import import_optional
from ciphertune.bundle.files import TensorFiles, checkpoint_files
from ciphertune.bundle.renaming import Renaming
from ciphertune.errors import ConfigError
from ciphertune.models.folders import refuse_folder
from ciphertune.models.load import load_named_model, load_tokenizer, refuse_adapter, smollm2_folder
from ciphertune.models.skeleton import build, tied_names
from ciphertune.outsourcing.layers import Candidate

_TOKENIZER_FILES = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "*.model",
    "generation_config.json",
)
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.*", "spiece.model")
"""Patterns of files of which a tokenizer has at least one."""
_HUB_FILES = ("*.safetensors", "*.json", *_TOKENIZER_FILES)


class Source(abc.ABC):
    """A model whose tensors can be had one by one.

    Attributes:
        name: what an adapter will name as its base model.
        model: its module tree, with or without weights.
    """

    name: str
    model: nn.Module

    @abc.abstractmethod
    def weight(self, candidate: Candidate) -> Tensor:
        """A linear layer's weight, (out_features, in_features)."""

    @abc.abstractmethod
    def tensor(self, name: str) -> Tensor:
        """A tensor of the state dict."""

    @abc.abstractmethod
    def save_companions(self, folder: Path) -> None:
        """Write the configuration and the tokenizer, where there are any."""

    @property
    @abc.abstractmethod
    def tokenizer(self) -> Any:
        """The model's tokenizer, None where there is none."""

    @abc.abstractmethod
    def whole(self) -> nn.Module:
        """The model with all of its weights, to be called and not changed."""

    @property
    def architecture(self) -> str | None:
        """Class name of a transformers model, None for other modules."""
        return type(self.model).__name__ if hasattr(self.model, "config") else None


class ModuleSource(Source):
    """A module that is in memory whole."""

    def __init__(self, model: nn.Module, name: str, tokenizer: Any = None) -> None:
        if hasattr(model, "peft_config"):
            raise ConfigError("the model has adapters: split the model without them, and add adapters to the client's")
        self.model = model
        self.name = name
        self._tokenizer = tokenizer
        self._state = model.state_dict()

    def weight(self, candidate: Candidate) -> Tensor:
        """See ``Source.weight``."""
        return candidate.weight()

    def tensor(self, name: str) -> Tensor:
        """See ``Source.tensor``."""
        tensor: Tensor = self._state[name]
        return tensor

    @property
    def tokenizer(self) -> Any:
        """See ``Source.tokenizer``."""
        return self._tokenizer

    def whole(self) -> nn.Module:
        """See ``Source.whole``."""
        return self.model

    def save_companions(self, folder: Path) -> None:
        """See ``Source.save_companions``."""
        for part in (
            getattr(self.model, "config", None),
            getattr(self.model, "generation_config", None),
            self._tokenizer,
        ):
            if part is not None and hasattr(part, "save_pretrained"):
                part.save_pretrained(folder)


class CheckpointSource(Source):
    """A folder with safetensors, read tensor by tensor through memory-mapped files.

    Raises:
        ConfigError: there are none, or they do not hold every tensor of the model under a name that can be told.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._files = TensorFiles(checkpoint_files(folder))
        self.name = name
        self.model = build(folder, name=name)
        self._aliases = {name: group for group in tied_names(self.model) for name in group}
        self._renaming = Renaming(self.model, self._files)
        self._stored = self._find_names()

    def weight(self, candidate: Candidate) -> Tensor:
        """See ``Source.weight``."""
        return candidate.matrix(self.tensor(candidate.tensor))

    def tensor(self, name: str) -> Tensor:
        """See ``Source.tensor``."""
        stored = self._stored[name]
        expected: Tensor = self.model.state_dict()[name]
        if stored is not None:
            tensor = self._files[stored]
        elif (alias := self._renamed(name)) is not None:
            tensor = self._renaming.make(alias, self._files.__getitem__)
            stored = name
        else:
            return expected
        if tensor.shape != expected.shape:
            raise ConfigError(
                f"{stored!r} in {self._folder} has shape {tuple(tensor.shape)}, the model's is {tuple(expected.shape)}"
            )
        return tensor

    @property
    def tokenizer(self) -> Any:
        """See ``Source.tokenizer``."""
        if not any(next(self._folder.glob(pattern), None) for pattern in _VOCABULARIES):
            return None
        with contextlib.suppress(ConfigError):
            return load_tokenizer(str(self._folder))
        return None

    def whole(self) -> nn.Module:
        """See ``Source.whole``: its tensors are pages of the files, as far as they are stored under one name."""
        model: Any = build(self._folder, name=self.name)
        state = {name: self.tensor(name) for name in model.state_dict()}
        model.load_state_dict(state, assign=True)
        model.tie_weights()
        whole: nn.Module = model
        return whole

    def save_companions(self, folder: Path) -> None:
        """See ``Source.save_companions``."""
        config: Any = self.model.config
        config.save_pretrained(folder)
        for pattern in _TOKENIZER_FILES:
            for file in self._folder.glob(pattern):
                shutil.copyfile(file, folder / file.name)

    def _renamed(self, name: str) -> str | None:
        """The name, or one of the same tensor, under which transformers' rules make it."""
        return next((each for each in (name, *self._aliases.get(name, ())) if each in self._renaming), None)

    def _find_names(self) -> dict[str, str | None]:
        """Name in the model → name in the files; None for what is renamed, or a buffer that the model computes."""
        state = self.model.state_dict()
        aliases = self._aliases
        prefix = f"{getattr(self.model, 'base_model_prefix', '')}."
        found: dict[str, str | None] = {}
        missing = []
        for name, tensor in state.items():
            spellings = [
                spelling
                for alias in [name, *aliases.get(name, [])]
                for spelling in (alias, alias.removeprefix(prefix), prefix + alias)
            ]
            stored = next((spelling for spelling in spellings if spelling in self._files), None)
            found[name] = stored
            if stored is None and tensor.is_meta and self._renamed(name) is None:
                missing.append(name)
        if missing:
            raise ConfigError(
                f"{len(missing)} tensors of the model, {missing[0]!r} among them, are not in {self._folder} under a "
                "name that can be told, so it cannot be read tensor by tensor: split it in memory (--in-memory)"
            )
        return found


def open_source(model: str | nn.Module, gguf_file: str | None, in_memory: bool) -> Source:
    """The source of a model as a user names it.

    Args:
        model: a folder, a hub name, the built-in ``smollm2``, or a module.
        gguf_file: file within the folder, for models in GGUF form.
        in_memory: load it whole even where it could be read tensor by tensor.

    Raises:
        ConfigError: it cannot be found or read.
    """
    if isinstance(model, nn.Module):
        name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
        return ModuleSource(model, name)
    if model == "smollm2":
        smollm2_folder()
        return ModuleSource(*_swap(load_named_model(model), model))
    refuse_folder(model, gguf_file=gguf_file)
    folder = Path(model)
    if gguf_file is None and not folder.is_dir():
        folder = _download(model)
    refuse_adapter(folder)
    if gguf_file is None and not in_memory and checkpoint_files(folder):
        return CheckpointSource(folder, model)
    return ModuleSource(*_swap(load_named_model(str(folder), gguf_file, whole=True), model))


def _swap(loaded: tuple[Any, Any], name: str) -> tuple[Any, str, Any]:
    return loaded[0], name, loaded[1]


def _download(name: str) -> Path:
    hub = import_optional("huggingface_hub", 'pip install "ciphertune[hf]"')
    try:
        return Path(hub.snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except Exception as error:
        # The hub's client raises errors of several libraries.
        raise ConfigError(f"{name!r} is neither a folder nor a model that the hub gives: {error}") from error


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of most of a model's parameters."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=sizes.__getitem__, default=torch.float32)
