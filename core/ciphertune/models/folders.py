"""Folders that a user names as a model: what each of them is, and what one that is no model lacks."""

from __future__ import annotations

import json
from pathlib import Path

from ciphertune._support.bundle_names import part_of_bundle
from ciphertune.errors import ConfigError

_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.h5", "*.msgpack")
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_TOKENIZERS = ("tokenizer*", "vocab.*", "*.model", "merges.txt", "spiece.*", "tekken.json")
_JSON = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_SHOWN = 4


def refuse_folder(name: str, *, weights: bool = True, tokenizer: bool = False, gguf_file: str | None = None) -> None:
    """Raise ``ConfigError`` for a folder on this machine that transformers could make no model of, with what it lacks.

    A client's part of a bundle passes where no weights are asked for. A name that is no folder passes, too.

    Args:
        name: what the user gave.
        weights: whether the weights are to be read.
        tokenizer: whether a tokenizer is.
        gguf_file: file within the folder that holds the model.
    """
    folder = Path(name)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"{name!r} is a file: name the folder that holds the model")
    if gguf_file is not None:
        if not (folder / gguf_file).is_file():
            raise ConfigError(f"there is no file {gguf_file!r} in {name!r}, which holds {_content(folder)}")
        return
    part = part_of_bundle(folder)
    if part == "worker":
        raise ConfigError(
            f"{name!r} is a worker's part of a bundle: the data owner's is the folder 'client' that was written with it"
        )
    if part == "whole":
        raise ConfigError(f"{name!r} is a bundle with both parts in it: name {str(folder / 'client')!r}")
    if part == "client" and weights:
        raise ConfigError(f"{name!r} is the client's part of a bundle, which lacks weights: name the original model")
    names = {path.name for path in folder.iterdir()}
    for file in _JSON if weights or tokenizer else _JSON[:1]:
        if file in names:
            _refuse_damaged(folder / file)
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ConfigError(
                f"{name!r} is an adapter and no model: name the model that it is of, and the adapter in model.adapter"
            )
        if (folder / "model_index.json").is_file():
            raise ConfigError(f"{name!r} is a pipeline of diffusers: name one of its parts, such as {name}/unet")
        raise ConfigError(f"{name!r} is no model: it has no config.json and holds {_content(folder)}")
    if weights:
        _refuse_without_weights(folder, name)
    if tokenizer and not any(next(folder.glob(pattern), None) for pattern in _TOKENIZERS):
        raise ConfigError(
            f"{name!r} has no tokenizer (tokenizer.json or tokenizer_config.json): save it beside the model, with "
            "tokenizer.save_pretrained"
        )


def _refuse_damaged(file: Path) -> None:
    """Raise ``ConfigError`` for a file that holds no JSON object; transformers passes over some that it cannot read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text (byte {error.start}): fetch the model again") from None
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}: fetch the model again") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{file} is cut off or is no JSON: fetch the model again") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds no JSON object: fetch the model again")


def _refuse_without_weights(folder: Path, name: str) -> None:
    for index in _INDICES:
        try:
            files = set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values())
            absent = sorted(str(file) for file in files if not (folder / str(file)).exists())
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ConfigError(f"{folder / index} is damaged: fetch the model again") from None
        if absent:
            raise ConfigError(
                f"{name!r} lacks {len(absent)} of its {len(files)} files of weights, {absent[0]!r} among them: fetch "
                "the model again"
            )
        return
    found = [path for pattern in _WEIGHTS for path in folder.glob(pattern)]
    if not found:
        raise ConfigError(f"{name!r} has a config.json and no weights (model.safetensors): fetch the model again")
    for file in found:
        if not file.exists():
            raise ConfigError(f"{file} is a link that leads nowhere: fetch the model again")


def _content(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return "nothing"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more
