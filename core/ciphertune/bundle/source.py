"""Sources of the weights of a model to split: a module in memory, or a checkpoint read tensor by tensor."""

from __future__ import annotations

import abc
import contextlib
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ciphertune.bundle.renaming import Renaming
from ciphertune.checkpoints.files import checkpoint_files, open_tensors, read_tensor
from ciphertune.checkpoints.tensors import PlainTensors
from ciphertune.errors import ConfigError
from ciphertune.models.folders import refuse_folder
from ciphertune.models.hub import copy_companions, download
from ciphertune.models.load import load_named_model, load_tokenizer, refuse_adapter, smollm2_folder
from ciphertune.models.skeleton import build, is_diffusers, tied_names
from ciphertune.outsourcing.layers import Candidate
from ciphertune.outsourcing.obstacles import is_conv1d

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.*", "spiece.model")
"""Patterns of files of which a tokenizer has at least one."""


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

    def codes(self, candidate: Candidate) -> tuple[Tensor, Tensor] | None:
        """The (N, K) int8 codes and (N,) float32 scales that a layer's weight is stored as, None if it is not."""
        return None

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
    def whole(self, scratch: Path) -> nn.Module:
        """The model with all of its weights, to be called and not changed.

        Args:
            scratch: a folder for weights that are stored packed, as long as the model is used.
        """

    @property
    def architecture(self) -> str | None:
        """Class name of a transformers model, None for other modules."""
        return type(self.model).__name__ if hasattr(self.model, "config") else None


class ModuleSource(Source):
    """A module that is in memory whole.

    Args:
        model: the module.
        name: of the model.
        tokenizer: of the model.
        folder: with what belongs to it, where it was read from one.
    """

    def __init__(self, model: nn.Module, name: str, tokenizer: Any = None, folder: Path | None = None) -> None:
        if hasattr(model, "peft_config"):
            raise ConfigError("the model has adapters: split the model without them, and add adapters to the client's")
        self.model = model
        self.name = name
        self._tokenizer = tokenizer
        self._folder = folder
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

    def whole(self, scratch: Path) -> nn.Module:
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
        if self._folder is not None:
            copy_companions(self._folder, folder)


class CheckpointSource(Source):
    """A folder with safetensors, read tensor by tensor through memory-mapped files.

    Raises:
        ConfigError: there are none, they do not hold every tensor of the model under a name that can be told, or they
            hold one in a way that is not known.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._files = PlainTensors(folder)
        self.name = name
        self.model = build(folder, name=name)
        self._aliases = {name: group for group in tied_names(self.model) for name in group}
        self._renaming = Renaming(self.model, self._files)
        self._stored = self._find_names()
        self._refuse_unknown()

    def weight(self, candidate: Candidate) -> Tensor:
        """See ``Source.weight``."""
        return candidate.matrix(self._read(candidate.tensor))

    def codes(self, candidate: Candidate) -> tuple[Tensor, Tensor] | None:
        """See ``Source.codes``."""
        if candidate.part is not None or is_conv1d(candidate.module):
            return None
        name = candidate.tensor
        stored = self._stored[name] or self._renaming.only_renamed(name)
        found = None if stored is None else self._files.codes(stored)
        return found if found is not None and found[0].shape == candidate.weight().shape else None

    def tensor(self, name: str) -> Tensor:
        """See ``Source.tensor``: in the model's dtype if it is stored packed, else as it is stored."""
        tensor = self._read(name)
        made_of = self._made_of(name)
        return tensor.to(self.model.state_dict()[name].dtype) if made_of & self._files.packed else tensor

    def _read(self, name: str) -> Tensor:
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

    def whole(self, scratch: Path) -> nn.Module:
        """See ``Source.whole``: its tensors are pages of files, as far as they are stored under one name or packed."""
        model: Any = build(self._folder, name=self.name)
        state = {name: self._paged(name, scratch) for name in model.state_dict()}
        model.load_state_dict(state, assign=True)
        model.tie_weights()
        whole: nn.Module = model
        return whole

    def save_companions(self, folder: Path) -> None:
        """See ``Source.save_companions``."""
        model: Any = self.model
        # Models of diffusers save a configuration themselves.
        save = getattr(model, "save_config", None) or model.config.save_pretrained
        save(folder)
        copy_companions(self._folder, folder)

    def _paged(self, name: str, scratch: Path) -> Tensor:
        """A tensor, as pages of a file of its own where it is stored packed."""
        tensor = self.tensor(name)
        if not self._made_of(name) & self._files.packed:
            return tensor
        from safetensors.torch import save_file

        with tempfile.NamedTemporaryFile(dir=scratch, suffix=".safetensors", delete=False) as file:
            path = Path(file.name)
        save_file({"tensor": tensor.contiguous()}, path)
        return read_tensor(open_tensors(path), path, "tensor")

    def _made_of(self, name: str) -> set[str]:
        """Names in the files of what a tensor of the model is read from."""
        stored = self._stored[name]
        if stored is not None:
            return {stored}
        alias = self._renamed(name)
        return set() if alias is None else set(self._renaming.sources(alias))

    def _refuse_unknown(self) -> None:
        """Refuse numbers that do not stand for themselves, and tensors beside a weight that would change it."""
        state = self.model.state_dict()
        used: set[str] = set()
        for name, tensor in state.items():
            for stored in self._made_of(name):
                used.add(stored)
                if tensor.is_floating_point() and not self._files.is_floating(stored):
                    raise ConfigError(
                        f"{stored!r} in {self._folder} is stored as {self._files.dtype(stored)} where the model has "
                        f"{tensor.dtype}: how its numbers are to be read is not known"
                    )
        ignored: Any = getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        for stored in self._files:
            module, _, leaf = stored.rpartition(".")
            if stored in used or f"{module}.weight" not in used or leaf == "num_batches_tracked":
                continue
            if not any(re.search(pattern, stored) for pattern in ignored):
                raise ConfigError(
                    f"{stored!r} in {self._folder} stands beside a weight of the model, which has no such tensor: what "
                    "it does to that weight is not known"
                )

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
        loaded, tokenizer = load_named_model(model)
        return ModuleSource(loaded, model, tokenizer)
    refuse_folder(model, gguf_file=gguf_file)
    folder = Path(model)
    if gguf_file is None and not folder.is_dir():
        folder = download(model)
    refuse_adapter(folder)
    if gguf_file is None and not in_memory and checkpoint_files(folder):
        return CheckpointSource(folder, model)
    if is_diffusers(folder):
        raise ConfigError(
            f"{model!r} has no diffusion_pytorch_model.safetensors, and a part of diffusers is read from that alone"
        )
    loaded, tokenizer = load_named_model(str(folder), gguf_file, whole=True)
    return ModuleSource(loaded, model, tokenizer, None if gguf_file is not None else folder)


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of most of a model's parameters."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=sizes.__getitem__, default=torch.float32)
