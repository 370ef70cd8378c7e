"""LoRA adapters by peft: new ones, and one to go on with."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ciphertune._support.optional_imports import import_optional
from ciphertune._support.suggestions import closest
from ciphertune.errors import ConfigError
from ciphertune.outsourcing.convert import outsourced_layers
from ciphertune.outsourcing.heads import outside_base_models
from ciphertune.outsourcing.layers import linear_layers

ALL_LINEAR: Literal["all-linear"] = "all-linear"
"""In place of names: every linear layer but the output head and the heads of a task."""
_EXTRA = 'pip install "ciphertune[demo]"'


def add_lora(
    model: nn.Module, *, seed: int, rank: int, targets: Sequence[str] | str | None, **options: Any
) -> nn.Module:
    """Add LoRA adapters to a model with peft, initialised from a seed.

    Args:
        model: in the clear or outsourced.
        seed: of the initial values.
        rank: of the adapters.
        targets: names of layers, a pattern that peft takes, ``all-linear``, or None for the layers that peft gives
            adapters to in this architecture: all linear ones where it has no opinion.
        options: for ``peft.LoraConfig``.

    Raises:
        ConfigError: a name in ``targets`` is of no layer that could have an adapter, or peft refuses one.
    """
    peft = import_optional("peft", _EXTRA)
    if targets is None:
        targets = _usual(model)
    if targets == ALL_LINEAR:
        targets = all_linear(model)
    if not isinstance(targets, str):
        _check(model, targets)
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=rank, target_modules=targets, **options)
    with _peft("lora"):
        adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


def load_adapter(model: nn.Module, folder: str, task: str | None) -> nn.Module:
    """Put an adapter on a model, to train it further.

    Args:
        model: that the adapter was trained for, in the clear or outsourced.
        folder: as peft saves it. Nothing is looked for outside of this machine.
        task: peft's type of the task that the adapter must be of, None for a language model.

    Raises:
        ConfigError: there is none, it is of another model or task, or not of LoRA.
    """
    check_adapter(folder, task)
    peft = import_optional("peft", _EXTRA)
    with _peft(f"model.adapter {folder!r}"), warnings.catch_warnings():
        # Tensors that are missing in the file would be fresh ones, and only warned about.
        warnings.filterwarnings("error", message="Found missing adapter keys", category=UserWarning)
        adapted: nn.Module = peft.PeftModel.from_pretrained(model, folder, is_trainable=True)
    return adapted


def check_adapter(folder: str, task: str | None) -> None:
    """Check what an adapter's folder says of it; the model is not needed. Raises ``ConfigError``."""
    path = Path(folder) / "adapter_config.json"
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
        kind, of = stated["peft_type"], stated.get("task_type")
    except OSError as error:
        raise ConfigError(
            f"model.adapter: cannot read {path}: {error.strerror}. A folder with an adapter of peft is expected"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"model.adapter: {path} is damaged, or not of an adapter of peft") from error
    if kind != "LORA":
        raise ConfigError(f"model.adapter: {folder!r} is an adapter of the kind {kind}; LORA can be trained further")
    language = (None, "CAUSAL_LM")
    if (of not in language) if task is None else (of != task):
        raise ConfigError(
            f"model.adapter: {folder!r} was trained for the task {of or 'of a language model'}, and this run is for "
            f"{task or 'a language model'}: see 'task' in the configuration"
        )
    if not any((Path(folder) / name).is_file() for name in ("adapter_model.safetensors", "adapter_model.bin")):
        raise ConfigError(f"model.adapter: {folder!r} holds no adapter_model.safetensors")


def all_linear(model: nn.Module) -> list[str]:
    """Names of the linear layers of a model that adapters are added to: no output head, no heads of a task.

    peft's own ``all-linear`` passes over outsourced layers.

    Raises:
        ConfigError: there is none.
    """
    outside = outside_base_models(model)
    getter = getattr(model, "get_output_embeddings", None)
    if callable(getter):
        outside |= {id(getter())}
    modules = dict(model.named_modules())
    names = [c.name for c in linear_layers(model, allow_meta=True) if c.part is None] + [
        each.name for each in outsourced_layers(model)
    ]
    found = sorted(name for name in names if id(modules.get(name)) not in outside)
    if not found:
        raise ConfigError("lora.target_modules: the model has no linear layer that could have an adapter")
    # The last parts of names say the same in short where no other module ends like them.
    ends = sorted({name.rpartition(".")[2] for name in found})
    meant = [name for name in modules if name.rpartition(".")[2] in ends]
    return ends if set(meant) == set(found) and not any(end.isdigit() for end in ends) else found


def _usual(model: Any) -> list[str] | str:
    """The targets that peft takes for a model's architecture."""
    peft = import_optional("peft", _EXTRA)
    known = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    names = known.get(getattr(getattr(model, "config", None), "model_type", None))
    if not isinstance(names, list):
        return ALL_LINEAR
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return names if present.issuperset(names) else ALL_LINEAR


def _check(model: nn.Module, targets: Sequence[str]) -> None:
    named = {name for name, module in model.named_modules() if hasattr(module, "weight")}
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in named):
            linear = {c.name.rpartition(".")[2] for c in linear_layers(model, allow_meta=True) if c.part is None}
            linear |= {layer.name.rpartition(".")[2] for layer in outsourced_layers(model)}
            raise ConfigError(f"lora.target_modules: no layer is called {target!r}; {closest(target, linear)}")


@contextlib.contextmanager
def _peft(what: str) -> Iterator[None]:
    with warnings.catch_warnings():
        # peft asks transformers for a property under a name that transformers is about to drop.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        # It sets this itself for layers that store their weight the other way round.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to", category=UserWarning)
        try:
            yield
        except (ValueError, RuntimeError, TypeError, KeyError, UserWarning, OSError) as error:
            text = " ".join(str(error).split())
            raise ConfigError(f"{what}: {text[:400]}") from error
