"""Models without weights: the module tree of a model of transformers or diffusers, parameters on the meta device."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ciphertune._support.optional_imports import import_optional
from ciphertune.errors import ConfigError
from ciphertune.models.bounded import bounded, refuse_meta_buffers
from ciphertune.models.folders import refuse_folder

_EXTRA = 'pip install "ciphertune[hf]"'


def build(folder: Path, architecture: str | None = None, *, name: str = "", **changes: Any) -> nn.Module:
    """The model that a folder's ``config.json`` describes.

    Parameters are on the meta device and take no memory; buffers, such as rotary frequencies, are real, and take
    ``bounded.ROOM`` at most.

    Args:
        folder: of a transformers model, or of a part of a pipeline of diffusers.
        architecture: name of its class; the first of the config's if None.
        name: what the model says it is called.
        changes: attributes of the config to set first.

    Raises:
        ConfigError: transformers is missing, or cannot make this model, or its buffers would be too large.
    """
    refuse_folder(str(folder), weights=False)
    if is_diffusers(folder):
        return _build_part(folder, architecture)
    transformers = import_optional("transformers", _EXTRA)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a configuration's numbers and names are not checked by the classes that take them
        raise ConfigError(f"transformers cannot read the model configuration in {folder}: {error}") from error
    for attribute, value in changes.items():
        setattr(config, attribute, value)
    unpacked_config(config)
    config._name_or_path = name or str(folder)
    chosen = architecture or (getattr(config, "architectures", None) or [None])[0]
    model_class = getattr(transformers, str(chosen), None)
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise ConfigError(f"the configuration in {folder} names no model class that transformers has: {chosen!r}")
    try:
        return assemble(config, model_class)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"transformers cannot make the model that {folder / 'config.json'} describes: "
            f"{type(error).__name__}: {str(error)[:300]}"
        ) from error


def is_diffusers(folder: Path) -> bool:
    """Whether a folder is one of the parts of a pipeline of diffusers."""
    return "_class_name" in _content(folder)


def _content(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    return {}


def _build_part(folder: Path, architecture: str | None) -> nn.Module:
    """The model of a part of diffusers, as ``build`` makes it. Raises ``ConfigError``."""
    extra = 'pip install "ciphertune[diffusers]"'
    diffusers = import_optional("diffusers", extra)
    accelerate = import_optional("accelerate", extra)
    content = _content(folder)
    chosen = str(architecture or content["_class_name"])
    model_class = getattr(diffusers, chosen, None)
    if not (isinstance(model_class, type) and issubclass(model_class, diffusers.ModelMixin)):
        raise ConfigError(f"the configuration in {folder} names no model class that diffusers has: {chosen!r}")
    try:
        with _default_dtype(None), accelerate.init_empty_weights(include_buffers=False), bounded():
            made: nn.Module = model_class.from_config(content)  # type: ignore[attr-defined]
    except ConfigError:
        raise
    except Exception as error:  # as for models of transformers
        raise ConfigError(
            f"diffusers cannot make the model that {folder / 'config.json'} describes: "
            f"{type(error).__name__}: {str(error)[:300]}"
        ) from error
    refuse_meta_buffers(made)
    return made.eval()


def unpacked_config(config: Any) -> None:
    """Take out of a configuration that the model's weights are packed: what is made of it has plain ones."""
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))):
        for key in ("quantization_config", "compression_config"):
            if key in getattr(part, "__dict__", {}):
                delattr(part, key)


def assemble(config: Any, model_class: type[nn.Module]) -> nn.Module:
    """The model of a configuration, as ``build`` makes it.

    Raises:
        ConfigError: accelerate is missing, or the model's buffers or the number of its modules would be too large.
    """
    accelerate = import_optional("accelerate", _EXTRA)
    dtype = getattr(config, "dtype", None)
    with _default_dtype(dtype), accelerate.init_empty_weights(include_buffers=False), bounded():
        model: Any = model_class(config)
    refuse_meta_buffers(model)
    # Tying inside that context made copies.
    model.tie_weights()
    return model.eval()  # type: ignore[no-any-return]


@contextlib.contextmanager
def _default_dtype(dtype: Any) -> Iterator[None]:
    before = torch.get_default_dtype()
    stated = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    torch.set_default_dtype(dtype if stated else torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def tied_names(model: nn.Module) -> list[list[str]]:
    """State-dict names of parameters and buffers that are one tensor, in module order; only where there are several."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return [group for group in names.values() if len(group) > 1]
