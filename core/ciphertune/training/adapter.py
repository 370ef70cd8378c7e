"""A peft model's adapter: switching it off, and saving it."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from ciphertune._support.atomic import atomic_directory, draft_directory, sync_tree
from ciphertune.errors import NoAdapterError


def is_peft(model: nn.Module) -> bool:
    """Whether peft wrapped the model."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Without the adapter; which parameters are trainable is as before afterwards.

    Raises:
        NoAdapterError: the model is not a peft model.
    """
    peft_model = _peft_model(model)
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with peft_model.disable_adapter():
            yield
    finally:
        # peft makes all of the adapter trainable when it switches it on again.
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)


def save(model: nn.Module, path: Path) -> None:
    """Write the adapter to a directory, whole; files of the same names there are replaced, one by one.

    Raises:
        NoAdapterError: the model is not a peft model.
    """
    peft_model = _peft_model(model)
    if not path.exists():
        with atomic_directory(path) as draft:
            _write(peft_model, draft)
        return
    # What else is in a directory that exists is not ours to remove, so it cannot be replaced as a whole.
    with draft_directory(path) as draft:
        _write(peft_model, draft)
        sync_tree(draft)
        for file in sorted(draft.rglob("*")):
            target = path / file.relative_to(draft)
            if file.is_dir():
                target.mkdir(exist_ok=True)
            else:
                file.replace(target)


def _write(peft_model: Any, directory: Path) -> None:
    with warnings.catch_warnings():
        # peft wonders whether the vocabulary grew where the base model has no config file, as in GGUF form.
        warnings.filterwarnings("ignore", message="Could not find a config file", category=UserWarning)
        peft_model.save_pretrained(directory, save_embedding_layers=_save_embeddings(peft_model))


def _save_embeddings(peft_model: Any) -> bool | str:
    """Whether the vocabulary grew; peft would ask a model hub for the original's size, which a bundle knows."""
    base = peft_model.get_base_model()
    original = getattr(base, "vocabulary_in_bundle", None)
    if original is None:
        return "auto"
    # 0 is a model without a vocabulary.
    return original != 0 and bool(base.get_input_embeddings().num_embeddings != original)


def _peft_model(model: nn.Module) -> Any:
    if not is_peft(model):
        raise NoAdapterError(
            f"the model is a {type(model).__name__} and not a peft model: wrap it with peft.get_peft_model first"
        )
    return model
