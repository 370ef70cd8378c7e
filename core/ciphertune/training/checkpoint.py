"""Checkpoints on disk: ``checkpoint-<step>/`` directories of safetensors and JSON.

``trainable.safetensors`` holds trainable parameters and persistent buffers by their names in the model,
``state.json`` everything else with its tensors in ``state.safetensors``, and ``adapter/``, for a peft model, the
adapter as peft saves it. A checkpoint reveals more about the private data than the adapter: keep it at the client.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ciphertune._support.atomic import atomic_directory, libraries_write, remove_directory
from ciphertune.errors import CheckpointError
from ciphertune.training import codec

FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")
_TENSOR_FILES = ("trainable.safetensors", "state.safetensors")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint.

    Attributes:
        step: optimizer steps done.
        trainable: trainable parameters and persistent buffers by name.
        state: nested plain values and tensors that a resumed run needs.
    """

    step: int
    trainable: dict[str, Tensor]
    state: dict[str, Any]


def list_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a directory, by increasing step."""
    if not directory.is_dir():
        return []
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def write_checkpoint(
    directory: Path, checkpoint: Checkpoint, save_adapter: Callable[[Path], None] | None = None
) -> Path:
    """Write ``directory/checkpoint-<step>``, whole or not at all.

    Args:
        directory: made if missing.
        checkpoint: what to write.
        save_adapter: writes the adapter into the directory that it is given.

    Raises:
        CheckpointError: the disk refuses, or the state holds something other than plain values and tensors.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    state = codec.encode(checkpoint.state, tensors, "state")
    final = directory / f"checkpoint-{checkpoint.step}"
    try:
        with atomic_directory(final, mode=0o700) as draft, libraries_write():
            save_file(checkpoint.trainable, draft / _TENSOR_FILES[0])
            save_file(tensors, draft / _TENSOR_FILES[1])
            digests = {name: _digest(draft / name) for name in _TENSOR_FILES}
            document = {"format": FORMAT, "step": checkpoint.step, "files": digests, "state": state}
            (draft / "state.json").write_text(json.dumps(document, allow_nan=False), encoding="utf-8")
            if save_adapter is not None:
                save_adapter(draft / "adapter")
    except OSError as error:
        raise CheckpointError(
            f"{final} cannot be written: {error}. Earlier checkpoints are as they were; "
            "make room, or copy them to another checkpoint_dir, and resume from there (resume=True, or --resume on the "
            "command line)"
        ) from error
    return final


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint and check that every file is what was written.

    Raises:
        CheckpointError: a file is missing, damaged, or of another format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = path / "state.json"
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        tensors = []
        for name in _TENSOR_FILES:
            file = path / name
            if _digest(file) != document["files"][name]:
                raise ValueError("it is not the file that was written")
            tensors.append(load_file(file))
        file = path / "state.json"
        step, state = document["step"], codec.decode(document["state"], tensors[1])
        if type(step) is not int or step < 0 or not isinstance(state, dict):
            raise ValueError("it does not hold a step and a state")
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise unusable(file, error) from error
    return Checkpoint(step, tensors[0], state)


def prune(directory: Path, keep: int | None) -> None:
    """Remove all but the ``keep`` latest checkpoints; None keeps all."""
    if keep is not None:
        for path in list_checkpoints(directory)[:-keep]:
            remove_directory(path)


def unusable(file: Path, error: Exception) -> CheckpointError:
    """Make the error for a checkpoint file that is damaged or was tampered with."""
    if isinstance(error, OSError):
        why = error.strerror or str(error)
    elif isinstance(error, json.JSONDecodeError | UnicodeDecodeError | RecursionError):
        why = "it is cut off or is no JSON"
    else:
        why = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
    return CheckpointError(
        f"{file} cannot be used: {why}. Nothing was changed. "
        f"Move {file.parent} away to resume from the checkpoint before it"
    )


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
