"""The adapter of a peft model: disabled for a while, and saved."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from ciphertune._support.atomic import atomic_directory, draft_directory, libraries_write, sync_tree
from ciphertune.errors import NoAdapterError
from ciphertune.models.names import published_name
from ciphertune.outsourcing.walk import peft_types


def is_peft(model: nn.Module) -> bool:
    """Whether peft wrapped the model."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Disable the adapter within a ``with`` block. The same parameters are trainable afterwards.

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


@contextlib.contextmanager
def enabled(model: nn.Module) -> Iterator[None]:
    """Enable the adapters of peft within a ``with`` block, where they are disabled; afterwards all is as it was."""
    tuned, whole = peft_types()
    off: list[Any] = [
        module for module in model.modules() if isinstance(module, (*tuned, *whole)) and _disabled(module)
    ]
    if not off:
        yield
        return
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for module in off:
            module.enable_adapters(True)
        yield
    finally:
        for module in off:
            module.enable_adapters(False)
        # peft makes all of an adapter trainable when it is switched on, and none of it when it is switched off.
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)


def has_adapter(model: nn.Module) -> bool:
    """Whether a model has adapters: of peft, or modules of one's own with LoRA's two matrices."""
    if is_peft(model):
        return True
    tuned, _ = peft_types()
    return any(isinstance(module, tuned) or _own_lora(module) for module in model.modules())


def save(model: nn.Module, path: Path) -> None:
    """Write the adapter to a directory, whole; files of the same names there are replaced, one by one.

    Raises:
        NoAdapterError: the model is not a peft model.
        OSError: the disk refuses.
    """
    peft_model = _peft_model(model)
    if not path.exists():
        with atomic_directory(path) as draft:
            _write(peft_model, draft)
        return
    # Other files of an existing directory are kept, so it cannot be replaced as a whole.
    with draft_directory(path) as draft:
        _write(peft_model, draft)
        sync_tree(draft)
        for file in sorted(draft.rglob("*")):
            target = path / file.relative_to(draft)
            if file.is_dir():
                target.mkdir(exist_ok=True)
            else:
                file.replace(target)


def _disabled(module: Any) -> bool:
    found = module.disable_adapters
    return bool(found() if callable(found) else found)


def _own_lora(module: nn.Module) -> bool:
    held = {name.lower() for name in (*module._parameters, *module._modules)}
    return {"lora_a", "lora_b"} <= held


def _write(peft_model: Any, directory: Path) -> None:
    with warnings.catch_warnings(), libraries_write():
        # peft warns that the vocabulary may have grown where the base model has no config file, as in GGUF form.
        warnings.filterwarnings("ignore", message="Could not find a config file", category=UserWarning)
        peft_model.save_pretrained(directory, save_embedding_layers=_save_embeddings(peft_model))
    _name_base(directory, peft_model)


def _name_base(directory: Path, peft_model: Any) -> None:
    """State the base model by a name that means something elsewhere, in place of a path of this machine.

    peft writes it into the configuration and into the card (README.md) of each adapter.
    """
    base = peft_model.get_base_model()
    named = (getattr(base, "config", None), "_name_or_path"), (base, "name_or_path")
    given = next((found for of, name in named if (found := str(getattr(of, name, None) or ""))), "")
    for file in directory.rglob("adapter_config.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        stated = str(content.get("base_model_name_or_path") or given)
        content["base_model_name_or_path"] = published_name(stated) or None
        file.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")
    card = directory / "README.md"
    if given and card.is_file():
        text = card.read_text(encoding="utf-8")
        card.write_text(text.replace(given, published_name(given)), encoding="utf-8")


def _save_embeddings(peft_model: Any) -> bool | str:
    """Whether the vocabulary grew: peft would ask a model hub for the original's size, which a bundle states."""
    base = peft_model.get_base_model()
    original = getattr(base, "original_vocabulary", None)
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
