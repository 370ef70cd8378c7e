"""A trained adapter for use elsewhere: merged into its model, or as a file for llama.cpp."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ciphertune._support.atomic import draft_directory, libraries_write, put_directory, sync_tree
from ciphertune._support.optional_imports import import_optional
from ciphertune.bundle.client import is_client_folder
from ciphertune.checkpoints.files import open_tensors, read_tensor
from ciphertune.errors import ConfigError
from ciphertune.models.known import skeleton
from ciphertune.models.load import known_labels, load_classifier, load_named_model, stored_dtype
from ciphertune.models.names import published_name
from ciphertune.training.gguf_adapter import refuse, write_gguf_adapter

Form = Literal["model", "gguf"]
"""``model`` is a folder for transformers with the adapter merged in; ``gguf`` a file with the adapter alone."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        out: the folder or file.
        form: see ``Form``.
        model: the model by the name that the hub has for it, or the last part of its path.
        adapter_of: the model that the adapter says it is of; None where it does not say.
        layers: with an adapter.
        dtype: of the weights that were written.
        bytes: of all that was written.
    """

    out: Path
    form: Form
    model: str
    adapter_of: str | None
    layers: int
    dtype: str
    bytes: int


def export_adapter(
    model: str,
    adapter: Path,
    out: Path,
    *,
    form: Form = "model",
    gguf_file: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Exported:
    """Merge an adapter into its model, or write it in GGUF form; nothing is sent to a worker.

    Args:
        model: that the adapter was trained for: the built-in ``smollm2``, a folder or a hub name. For ``gguf`` its
            configuration alone is read, so that a bundle's client will do.
        adapter: a folder as peft saves it, ``adapter`` in the output of a run.
        out: a folder for ``model``, a file for ``gguf``; whole or not at all.
        form: see ``Form``.
        gguf_file: file within ``model``, where that is in GGUF form.
        dtype: one of ``DTYPES``, of a merged model's weights, which are computed in float32; as the model is stored if
            None.
        overwrite: replace ``out`` where it exists.

    Raises:
        ConfigError: there is no adapter, or it is of another model, or of a kind that cannot be exported; ``out``
            exists or cannot be written; the model cannot be loaded, or is a bundle's client, which lacks the weights.
    """
    config = _adapter_config(adapter)
    if form == "gguf":
        refuse(config)
        if dtype not in (None, "float32"):
            raise ConfigError("a GGUF adapter is written in float32: leave --dtype out")
    elif is_client_folder(model):
        raise ConfigError(
            f"{model} is a bundle's client, whose outsourced weights are at the workers, so nothing can be merged into "
            "them: name the model that was split, or export a GGUF adapter (--form gguf), which needs no weights"
        )
    _check_out(out, form, overwrite)
    tensors = _adapter_tensors(adapter)
    stated = config.get("base_model_name_or_path") or None
    try:
        if form == "gguf":
            base = load_named_model(model, gguf_file)[0] if gguf_file is not None else skeleton(model)
            _refuse_folder(out)
            written = write_gguf_adapter(out, base, config, tensors)
            layers, kind, size = written.layers, "float32", written.bytes
        else:
            chosen = stored_dtype(model, gguf_file) if dtype is None else DTYPES[dtype]
            merged, tokenizer = _merged(model, gguf_file, adapter, config, tensors)
            layers, kind = len({key.partition(".lora_")[0] for key in tensors if ".lora_" in key}), str(chosen)[6:]
            size = _save(merged.to(chosen), tokenizer, out)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror or error}") from error
    return Exported(out, form, published_name(model), stated, layers, kind, size)


def _adapter_config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not isinstance(content.get("peft_type"), str):
            raise ValueError("it names no kind of adapter")
        if content["peft_type"] == "LORA" and not isinstance(content.get("lora_alpha"), int | float):
            raise ValueError("it has no lora_alpha")
    except OSError as error:
        raise ConfigError(
            f"there is no adapter in {folder}: cannot read {path.name}: {error.strerror}. 'ciphertune train' leaves "
            "one in the folder 'adapter' of its output"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged, or not of an adapter of peft: {error}") from error
    return content


def _adapter_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise ConfigError(f"{folder} holds no {path.name}: save the adapter with peft 0.20 or later")
    handle = open_tensors(path)
    return {name: read_tensor(handle, path, name) for name in handle.keys()}  # noqa: SIM118


def _check_out(out: Path, form: Form, overwrite: bool) -> None:
    taken = out.is_file() or (out.is_dir() and (form == "gguf" or any(out.iterdir())))
    if taken and not overwrite:
        raise ConfigError(f"{out} exists already: name another, or replace it with --overwrite")
    if form == "model" and out.is_file():
        raise ConfigError(f"{out} is a file, and a merged model is a folder: name another")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with draft_directory(out):
            pass
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}") from error


def _refuse_folder(out: Path) -> None:
    if out.is_dir():
        raise ConfigError(f"{out} is a folder, and a GGUF adapter is a file: name one, such as {out / 'adapter.gguf'}")


def _merged(
    model: str, gguf_file: str | None, adapter: Path, config: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[Any, Any]:
    """The model in float32 with the adapter merged in, and its tokenizer."""
    peft = import_optional("peft", 'pip install "ciphertune[demo]"')
    base, tokenizer = _base(model, gguf_file, adapter, config)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Tensors that the file lacks would be fresh ones, and only warned about.
            warnings.filterwarnings("error", message="Found missing adapter keys", category=UserWarning)
            adapted = peft.PeftModel.from_pretrained(base, str(adapter))
            _check_all_used(peft, adapted, tensors)
            merged = adapted.merge_and_unload(safe_merge=True)
    except ConfigError:
        raise
    except (ValueError, RuntimeError, TypeError, KeyError, AttributeError, NotImplementedError, UserWarning) as error:
        text = " ".join(str(error).split())[:400]
        if "size mismatch" in text or "arget module" in text or "missing adapter keys" in text:
            raise ConfigError(f"the adapter in {adapter} is of another model than {model!r}: {text}") from error
        raise ConfigError(f"peft cannot merge the adapter in {adapter} ({config['peft_type']}): {text}") from error
    return merged, tokenizer


def _base(model: str, gguf_file: str | None, adapter: Path, config: dict[str, Any]) -> tuple[Any, Any]:
    if config.get("task_type") == "SEQ_CLS":
        labels = known_labels(str(adapter)) if (adapter / "config.json").is_file() else known_labels(model, gguf_file)
        if labels is None:
            raise ConfigError(
                f"the adapter in {adapter} is of a classifier, and neither its folder nor the model names the labels"
            )
        base, tokenizer, _ = load_classifier(model, labels, gguf_file)
        return base, tokenizer
    # A folder without a tokenizer can be merged into, too.
    base, tokenizer = load_named_model(model, gguf_file, whole=True)
    return base.float(), tokenizer


def _check_all_used(peft: Any, adapted: Any, tensors: dict[str, Tensor]) -> None:
    """Raise ``ConfigError`` for tensors that the model has no place for, which peft passes over."""
    held = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False).keys() | adapted.state_dict().keys()
    left = sorted(tensors.keys() - held)
    if left:
        raise ConfigError(
            f"the adapter is of another model: {len(left)} of its tensors have no place in this one, {left[0]!r} among "
            "them"
        )


def _save(merged: nn.Module, tokenizer: Any, out: Path) -> int:
    model: Any = merged
    with draft_directory(out) as draft, libraries_write():
        model.save_pretrained(draft)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
        sync_tree(draft)
        size = sum(file.stat().st_size for file in draft.rglob("*") if file.is_file())
        put_directory(draft, out)
    return size
