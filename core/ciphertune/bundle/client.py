"""A client's part of a bundle, and the model made of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ciphertune._support.own_modes import own_modes
from ciphertune.bundle.codes import FolderCodes
from ciphertune.bundle.files import (
    CLIENT_FORMAT,
    CLIENT_MANIFEST,
    OUTSOURCED,
    TensorFiles,
    checkpoint_files,
    floating,
    open_tensors,
    read_manifest_file,
    read_tensor,
)
from ciphertune.client.choice import choose
from ciphertune.errors import ConfigError
from ciphertune.models.load import note_vocabulary
from ciphertune.models.skeleton import build, tied_names
from ciphertune.outsourcing.convert import attach
from ciphertune.outsourcing.layers import Candidate, linear_layers
from ciphertune.plugins.manager import PluginManager, plugin_manager
from ciphertune.transport import LocalWorker
from ciphertune.weights import DIGEST_ROWS, LayerInfo

_DIGEST_BYTES = 32


@own_modes()
def load_client(
    folder: str | os.PathLike[str],
    to: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    skeleton: nn.Module | None = None,
    worker: LocalWorker | None = None,
    plugins: PluginManager | None = None,
    weights: str | os.PathLike[str] | None = None,
) -> Any:
    """The model of a bundle, its outsourced layers at the workers. No outsourced weight is ever allocated.

    Args:
        folder: ``client`` in a bundle.
        to: selection string that names the workers.
        dtype: of the weights that stay; as stored if None. As stored, on the CPU, they are pages of the files, which
            take memory only once they are used.
        device: of the model.
        skeleton: for a model that is not transformers': the module on the meta device, buffers real.
        worker: an embedded worker, for a transport that stays in this process.
        plugins: hook plugins; those of the process unless given.
        weights: a worker's folder, or one with several of them, in which an encryption that prepares itself reads the
            codes; the workers are asked for them if not given. It need not be trusted.

    Returns:
        The model, in evaluation mode.

    Raises:
        ConfigError: the folder is not a client's, damaged, or of other weights than the selection's backend takes.
        SelectionError, PluginError, SecurityError: about ``to``.
        WeightsError: the encryption prepares itself from the codes, and they cannot be had.
        TransportError, UnknownLayerError, WorkerError: the workers cannot be reached, or do not hold these layers.
    """
    place = Path(folder)
    manifest = read_manifest_file(place / CLIENT_MANIFEST, CLIENT_FORMAT)
    choice = choose(to)
    codes = None if weights is None else FolderCodes(weights)
    if not choice.transport.remote and worker is None:
        raise ConfigError(
            f"{to!r} evaluates in this process, but a client's folder holds no weights: name workers, for example "
            "'mlwe+zmq://HOST:5555', or pass an embedded one with worker="
        )
    infos, groups = _read_layers(place, manifest)
    bits = infos[0].weight_bits
    if choice.backend.weight_bits != bits:
        raise ConfigError(
            f"the bundle's weights have {bits} bits, but {to!r} takes {choice.backend.weight_bits or 32}: "
            f"add weight_bits={bits} to it, or split the model again"
        )
    name = str(manifest.get("model", ""))
    if skeleton is None:
        stored = floating(str(manifest.get("dtype")))
        architecture = manifest.get("architecture")
        if not isinstance(architecture, str):
            raise ConfigError(f"{place} is not of a transformers model: pass its modules with skeleton=")
        skeleton = build(place, architecture, name=name, dtype=dtype or stored)
    chosen = _candidates(skeleton, infos, place)
    _fill(skeleton, place, {f"{c.name}.weight" for c in chosen}, dtype, torch.device(device))
    _companions(skeleton, place)
    if not choice.options.share_inputs:
        groups = [(i,) for i in range(len(infos))]
    manager = plugins if plugins is not None else plugin_manager()
    return attach(skeleton, chosen, infos, groups, choice, worker, torch.device(device), manager, codes)


def is_client_folder(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder is the client's part of a bundle."""
    return (Path(folder) / CLIENT_MANIFEST).is_file()


def _read_layers(folder: Path, manifest: dict[str, Any]) -> tuple[list[LayerInfo], list[tuple[int, ...]]]:
    damaged = f"{folder / CLIENT_MANIFEST} is damaged"
    bits = manifest.get("weight_bits")
    rows, groups = manifest.get("layers"), manifest.get("groups")
    if bits not in (8, 16) or not isinstance(rows, list) or not isinstance(groups, list) or not rows:
        raise ConfigError(f"{damaged}: it lacks the layers, their groups or the weight format")
    file = folder / OUTSOURCED
    handle = open_tensors(file)
    infos = []
    for row in rows:
        try:
            name, k, n = str(row["name"]), int(row["in_features"]), int(row["out_features"])
            norms = float(row["max_row_norm"]), float(row["max_column_norm"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{damaged}: a layer lacks a name, a size or a norm") from error
        scale, digests = (read_tensor(handle, file, f"{name}.{part}") for part in ("scale", "digests"))
        blocks = -(-n // DIGEST_ROWS)
        if tuple(scale.shape) != (n,) or scale.dtype != torch.float32 or digests.numel() != blocks * _DIGEST_BYTES:
            raise ConfigError(f"{file} is damaged: scales or hashes of {name!r} do not fit its {n} rows")
        infos.append(LayerInfo(name, k, n, bits, scale.clone(), *norms, digests.numpy().tobytes()))
    try:
        read = [tuple(int(i) for i in group) for group in groups]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{damaged}: a group is not a list of numbers") from error
    if sorted(i for group in read for i in group) != list(range(len(infos))):
        raise ConfigError(f"{damaged}: its groups do not hold each layer once")
    return infos, read


def _candidates(model: nn.Module, infos: list[LayerInfo], folder: Path) -> list[Candidate]:
    by_name = {candidate.name: candidate for candidate in linear_layers(model, allow_meta=True, trial=False)}
    chosen = []
    for info in infos:
        candidate = by_name.get(info.name)
        if candidate is None or tuple(candidate.weight().shape) != (info.out_features, info.in_features):
            raise ConfigError(
                f"{folder} names a linear layer {info.name!r} of {info.in_features} to {info.out_features} features, "
                "which the model does not have"
            )
        chosen.append(candidate)
    return chosen


def _fill(
    model: nn.Module, folder: Path, outsourced: set[str], dtype: torch.dtype | None, device: torch.device
) -> None:
    """Give a model on the meta device the tensors of a folder."""
    groups = tied_names(model)
    files = TensorFiles(checkpoint_files(folder))
    expected = model.state_dict()
    state: dict[str, Tensor] = {}
    for name in files:
        tensor = files[name]
        if name not in expected or name in outsourced or tensor.shape != expected[name].shape:
            raise ConfigError(f"{folder} holds a tensor {name!r} of shape {tuple(tensor.shape)}, which does not fit")
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        state[name] = tensor.to(device)
    for group in groups:
        given = next((name for name in group if name in state), None)
        if given is not None:
            state |= {name: state[given] for name in group if name not in outsourced}
    missing = [name for name in expected if name not in state and name not in outsourced and expected[name].is_meta]
    if missing:
        raise ConfigError(f"{folder} is damaged: it lacks {len(missing)} tensors, {missing[0]!r} among them")
    model.load_state_dict(state, strict=False, assign=True)
    _tie(model, groups, outsourced)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)
            elif buffer is not None:
                raise ConfigError(f"the buffer {name!r} of {type(module).__name__} is on the meta device: make it real")


def _tie(model: nn.Module, groups: list[list[str]], outsourced: set[str]) -> None:
    """Make parameters that were one tensor one again, outsourced ones too, which are noted as tied."""
    for group in groups:
        here = [name for name in group if name not in outsourced]
        for name in group if here else ():
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, model.get_parameter(here[0]))


def _companions(model: Any, folder: Path) -> None:
    note_vocabulary(model)
    if (folder / "generation_config.json").exists() and hasattr(model, "generation_config"):
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder)
