"""A client's part of a bundle, and the model made of it."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ciphertune._support.bundle_names import CLIENT_MANIFEST
from ciphertune._support.own_modes import own_modes
from ciphertune.bundle.codes import FolderCodes
from ciphertune.bundle.files import CLIENT_FORMAT, OUTSOURCED, floating, read_manifest_file
from ciphertune.bundle.manifest import (
    ClientManifest,
    check_model_config,
    read_client,
    refuse_strange_files,
    sizes_of,
)
from ciphertune.bundle.outliers import check_kept, read_kept
from ciphertune.checkpoints.files import TensorFiles, checkpoint_files, open_tensors, read_tensor, tensor_shape
from ciphertune.client.choice import choose
from ciphertune.errors import ConfigError, LayerError
from ciphertune.models.load import note_vocabulary
from ciphertune.models.skeleton import build, tied_names
from ciphertune.models.tokenizer_files import check_tokenizer_files
from ciphertune.outsourcing.convert import attach
from ciphertune.outsourcing.convolution import convolutions
from ciphertune.outsourcing.embedding import Table, choose_table
from ciphertune.outsourcing.layers import ROUTED, Candidate, Experts, linear_layers, refuse_some_experts, sibling_groups
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
    manifest = check_client(place)
    choice = choose(to)
    codes = None if weights is None else FolderCodes(weights)
    if not choice.transport.remote and worker is None:
        raise ConfigError(
            f"{to!r} evaluates in this process, but a client's folder holds no weights: name workers, for example "
            "'mlwe+zmq://HOST:5555', or pass an embedded one with worker="
        )
    infos, groups, embeddings = _read_layers(place, manifest), list(manifest.groups), list(manifest.embeddings)
    bits = manifest.weight_bits
    if choice.backend.weight_bits != bits:
        raise ConfigError(
            f"the bundle's weights have {bits} bits, but {to!r} takes {choice.backend.weight_bits or 32}: "
            f"add weight_bits={bits} to it, or split the model again"
        )
    if skeleton is None:
        stored = floating(manifest.dtype)
        if manifest.architecture is None:
            raise ConfigError(f"{place} is not of a transformers model: pass its modules with skeleton=")
        skeleton = build(place, manifest.architecture, name=manifest.model, dtype=dtype or stored)
        # peft asks a hub for any name, and for an empty one nobody; what is no hub's is this machine's.
        setattr(skeleton, "name_or_path", manifest.model if "/" in manifest.model else "")  # noqa: B010
    options = choice.options
    chosen = _candidates(skeleton, infos[: sum(map(len, groups))], place, options.experts)
    table = _table(skeleton, chosen, infos, embeddings, place) if embeddings else None
    absent = {c.tensor for c in (*chosen, *(() if table is None else table.places))}
    _fill(skeleton, place, absent, dtype, torch.device(device))
    _companions(skeleton, place)
    if not options.share_inputs or any(c.part is not None for c in chosen):
        sizes = [info.in_features for info in infos[: len(chosen)]]
        groups = sibling_groups(chosen, sizes, share=options.share_inputs, experts=options.experts)
    manager = plugins if plugins is not None else plugin_manager()
    return attach(skeleton, chosen, infos, groups, choice, worker, torch.device(device), manager, codes, table)


def check_client(folder: Path) -> ClientManifest:
    """Look at a client's part of a bundle with distrust, before anything is made of it.

    Returns:
        Its manifest.

    Raises:
        ConfigError: it is no client's folder, or a field, a number or a file of it is out of range; it is named.
    """
    content = read_manifest_file(folder / CLIENT_MANIFEST, CLIENT_FORMAT)
    refuse_strange_files(folder)
    manifest = read_client(folder, content)
    kept = TensorFiles(checkpoint_files(folder)).headers()
    # Of an outsourced layer the file has a scale for each row, and nothing that its inputs could be counted by.
    shapes = [header.shape for header in kept.values()] + [(layer.out_features,) for layer in manifest.layers]
    check_model_config(folder, sizes_of(shapes))
    check_tokenizer_files(folder)
    return manifest


def is_client_folder(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder is the client's part of a bundle."""
    return (Path(folder) / CLIENT_MANIFEST).is_file()


def _read_layers(folder: Path, manifest: ClientManifest) -> list[LayerInfo]:
    """The layers of a manifest with their scales and hashes. Raises ``ConfigError``."""
    file = folder / OUTSOURCED
    handle = open_tensors(file)
    infos = []
    for layer in manifest.layers:
        n = layer.out_features
        blocks = -(-n // DIGEST_ROWS)
        sizes = {"scale": n, "digests": blocks * _DIGEST_BYTES}
        found: dict[str, Tensor] = {}
        for part, size in sizes.items():
            name = f"{layer.name}.{part}"
            # Of what the file says, before anything of it is read.
            if math.prod(tensor_shape(handle, file, name)) != size:
                raise ConfigError(f"{file} is damaged: {name} does not fit the {n} rows of its layer")
            found[part] = read_tensor(handle, file, name)
        scale, digests = found["scale"], found["digests"]
        if scale.dtype != torch.float32 or tuple(scale.shape) != (n,):
            raise ConfigError(f"{file} is damaged: {layer.name}.scale is no float32 vector")
        if digests.dtype != torch.uint8:
            raise ConfigError(f"{file} is damaged: {layer.name}.digests is {digests.dtype}, not uint8")
        if not bool((torch.isfinite(scale) & (scale >= 0)).all()):
            raise ConfigError(f"{file} is damaged: {layer.name}.scale holds values that are negative or not finite")
        info = LayerInfo(
            layer.name,
            layer.in_features,
            n,
            manifest.weight_bits,
            scale.clone(),
            layer.max_row_norm,
            layer.max_column_norm,
            digests.numpy().tobytes(),
        )
        infos.append(read_kept(handle, file, info) if layer.kept else info)
    check_kept([[infos[i] for i in group] for group in manifest.groups], file)
    return infos


def _table(
    model: nn.Module, chosen: list[Candidate], infos: list[LayerInfo], embeddings: list[str], folder: Path
) -> Table:
    """The token embedding that a bundle says is outsourced. Raises ``ConfigError`` where the model has another."""
    linear = [each for each in chosen if not isinstance(each.module, (nn.Conv1d, nn.Conv2d))]
    try:
        layers, table = choose_table(model, linear, allow_meta=True)
    except LayerError as error:
        raise ConfigError(f"{folder} names token embeddings, but: {error}") from error
    info = infos[len(chosen) if table.tied is None else table.tied]
    names = [place.name for place in table.places]
    shape = tuple(table.places[0].weight().shape)
    if names != embeddings or len(layers) != len(linear) or shape != (info.out_features, info.in_features):
        raise ConfigError(f"{folder} names token embeddings {embeddings}, which the model does not have: {names}")
    return table


def _candidates(model: nn.Module, infos: list[LayerInfo], folder: Path, experts: Experts) -> list[Candidate]:
    # Of one group, and of no class of its own: others are no product of patches.
    patched = [each for each in convolutions(model, allow_meta=True) if each.obstacle is None]
    found = linear_layers(model, allow_meta=True, trial=False, experts=experts)
    by_name = {each.name: each for each in (*found, *patched)}
    chosen = []
    for info in infos:
        candidate = by_name.get(info.name)
        if candidate is None or tuple(candidate.weight().shape) != (info.out_features, info.in_features):
            raise ConfigError(
                f"{folder} names a layer {info.name!r} of {info.in_features} to {info.out_features} features, "
                "which the model does not have"
            )
        if candidate.obstacle == ROUTED:
            raise ConfigError(f"{candidate.name}: {ROUTED}. Say so in the selection string")
        chosen.append(candidate)
    try:
        refuse_some_experts(chosen)
    except LayerError as error:
        raise ConfigError(f"{folder} is damaged: {error}") from error
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

        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except Exception as error:
            raise ConfigError(f"{folder / 'generation_config.json'} is damaged: {str(error)[:300]}") from error
