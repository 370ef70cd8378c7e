"""Splitting: a client's part and workers' parts, written block by block."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ciphertune._support.atomic import draft_directory, libraries_write, put_directory, sync_tree
from ciphertune._support.bundle_names import CLIENT_MANIFEST, WORKER_MANIFEST
from ciphertune.backend import WeightBits
from ciphertune.bundle.adopting import adopt
from ciphertune.bundle.files import (
    CLIENT_FORMAT,
    OUTSOURCED,
    WORKER_FORMAT,
    write_json,
)
from ciphertune.bundle.outliers import kept_tables
from ciphertune.bundle.placement import Placement
from ciphertune.bundle.source import Source, dtype_of, open_source
from ciphertune.checkpoints.files import INDEX
from ciphertune.errors import ConfigError, NothingOutsourcedError
from ciphertune.models.names import published_name
from ciphertune.models.skeleton import tied_names
from ciphertune.outsourcing.calibration import OFF, Calibration, calibration_of
from ciphertune.outsourcing.convolution import choose_convolutions
from ciphertune.outsourcing.embedding import Table, choose_table
from ciphertune.outsourcing.layers import Candidate, Experts, LayerChoice, choose_layers, sibling_groups
from ciphertune.outsourcing.outliers import keep_channels, products_with_outliers
from ciphertune.plugins.manager import plugin_manager
from ciphertune.weights import LayerInfo, LayerWeight, describe, quantize_layer

Progress = Callable[[int, int], None]
"""Called with weights written so far, and all of them."""

_CLIENT_FILE_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class SplitResult:
    """Sizes of the bundle that ``split`` wrote.

    Attributes:
        client: the client's folder.
        workers: the workers' folders.
        layers: number of outsourced layers.
        outsourced, at_client: weights.
        client_bytes: of the client's tensors.
        worker_bytes: of each worker's weights.
        products: of the model, forward and backward of each group of layers.
        with_outliers: those of which the client keeps channels; ``uncalibrated`` says why there are none to be found.
        uncalibrated: why the model was not calibrated; empty if it was.
    """

    client: Path
    workers: tuple[Path, ...]
    layers: int
    outsourced: int
    at_client: int
    client_bytes: int
    worker_bytes: tuple[int, ...]
    products: int
    with_outliers: int
    uncalibrated: str

    @property
    def fraction(self) -> float:
        """Outsourced weights over all."""
        return self.outsourced / max(self.outsourced + self.at_client, 1)


def split(
    model: str | os.PathLike[str] | nn.Module,
    out: str | os.PathLike[str],
    *,
    layers: LayerChoice | Iterable[LayerChoice] | None = None,
    embeddings: bool = False,
    convolutions: bool | LayerChoice | Iterable[LayerChoice] = False,
    experts: Experts = "all",
    workers: int = 1,
    placement: Placement | str = "rows",
    weight_bits: WeightBits = 8,
    gguf_file: str | None = None,
    in_memory: bool = False,
    force: bool = False,
    calibration: Calibration | str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> SplitResult:
    """Split a model into ``OUT/client`` and ``OUT/worker`` (``OUT/worker-0`` … where there are several).

    A folder of safetensors is read tensor by tensor: memory stays near one block of layers and the largest tensor that
    stays. ``OUT`` appears when it is complete. A model with a tokenizer is called with public text first, to find
    channels with outliers: this takes memory for its activations, and reads its weights as pages of the files.

    Args:
        model: a folder or hub name for transformers, the built-in ``smollm2``, or a module in memory.
        out: a folder that does not exist yet, or is empty.
        layers: which layers; see ``ciphertune.outsourcing.layers.choose_layers``.
        embeddings: whether the token embedding goes to the workers, too, for encrypted lookups; see
            ``ciphertune.outsource``.
        convolutions: which convolutions do; see ``ciphertune.outsource``.
        experts: "routed" to have experts that are layers of their own at the workers, too. Each gets what routing
            chose, and clients must say ``experts=routed`` in their selection string. Experts whose weights are stacked
            in one parameter need no such word.
        workers: how many to place the model on.
        placement: how: ``rows`` of every layer at each, cut at multiples of 64, which is fastest; ``layers``, whole
            ones in runs of about equal size; ``replicas`` with all layers, which share the disk's space; or numbers of
            these, as ``layers:2,rows:4``.
        weight_bits: 8 or 16 bits a weight.
        gguf_file: file within the folder, for models in GGUF form.
        in_memory: load the model whole, for checkpoints that cannot be read tensor by tensor.
        force: replace ``out``.
        calibration: a file with public text to find channels with outliers by, which the client's part then keeps; the
            Python language reference if not given, "off" to keep none, or what ``calibrate`` gave.
        progress: called as weights are written.

    Raises:
        ConfigError: the model cannot be read, an argument is wrong, or ``out`` exists or cannot be written.
        LayerError: about ``layers`` and ``embeddings``, or a weight that is not finite.
    """
    target = Path(out)
    placed = _check(target, workers, placement, weight_bits, force)
    source = open_source(model if isinstance(model, nn.Module) else os.fspath(model), gguf_file, in_memory)
    patched = choose_convolutions(source.model, convolutions, allow_meta=True)
    try:
        chosen = choose_layers(source.model, layers, plugin_manager(), allow_meta=True, experts=experts)
    except NothingOutsourcedError:
        if layers is not None or not patched:
            raise
        chosen = []
    table = None
    if embeddings:
        chosen, table = choose_table(source.model, chosen, allow_meta=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with draft_directory(target, 0o755) as draft, libraries_write():
            if isinstance(calibration, Calibration):
                found, why = calibration, ""
            elif calibration == OFF:
                found, why = None, "calibration is off"
            else:
                found, why = _calibrated(source, draft, calibration)
            writer = _Writer(source, chosen, patched, table, draft, weight_bits, placed, found, progress)
            result = dataclasses.replace(writer.write(), uncalibrated=why)
            sync_tree(draft)
            put_directory(draft, target)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror or error}") from error
    return dataclasses.replace(
        result,
        client=target / "client",
        workers=tuple(target / folder.name for folder in result.workers),
    )


def _calibrated(source: Source, draft: Path, text: str | os.PathLike[str] | None) -> tuple[Calibration | None, str]:
    tokenizer = source.tokenizer
    if tokenizer is None:
        return calibration_of(source.model, None, text)
    with tempfile.TemporaryDirectory(dir=draft) as scratch:
        return calibration_of(source.whole(Path(scratch)), tokenizer, text)


def _check(target: Path, workers: int, placement: Placement | str, weight_bits: int, force: bool) -> Placement:
    if workers < 1:
        raise ConfigError(f"workers must be 1 or more, not {workers}")
    placed = Placement.read(str(placement), workers)
    if weight_bits not in (8, 16):
        raise ConfigError(f"weight_bits must be 8 or 16, not {weight_bits!r}")
    if target.exists() and not force and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists already: name another folder, or replace it with --force (force=True)")
    return placed


class _Writer:
    """Writes one bundle into a folder."""

    def __init__(
        self,
        source: Source,
        linear: Sequence[Candidate],
        patched: Sequence[Candidate],
        table: Table | None,
        folder: Path,
        weight_bits: WeightBits,
        placement: Placement,
        calibration: Calibration | None,
        progress: Progress | None,
    ) -> None:
        self._source = source
        chosen = [*linear, *patched]
        places = () if table is None else table.places
        own = places[:1] if table is not None and table.tied is None else ()
        # Behind the layers stands a table that is none of them.
        self._chosen = [*chosen, *own]
        self._table = table
        self._absent = {each.tensor for each in (*chosen, *places)}
        self._folder = folder
        self._bits: WeightBits = weight_bits
        self._placement = placement
        self._calibration = calibration
        self._progress = progress or (lambda done, total: None)
        # Each convolution makes patches of its own of what it gets.
        self._groups = sibling_groups(linear, [c.weight().shape[1] for c in linear])
        self._groups += [(i,) for i in range(len(linear), len(chosen))]
        self._tables = [(i,) for i in range(len(chosen), len(self._chosen))]
        self._total = sum(c.weight().numel() for c in self._chosen)
        self._blocks: list[list[dict[str, Any]]] = [[] for _ in range(placement.parts)]
        self._bytes = [0] * placement.parts

    def write(self) -> SplitResult:
        client = self._folder / "client"
        client.mkdir()
        count, parts = self._placement.workers, self._placement.parts
        names = ["worker"] if count == 1 else [f"worker-{i}" for i in range(count)]
        folders = [self._folder / name for name in names]
        for folder in folders[:parts]:
            (folder / "layers").mkdir(parents=True)
        infos = self._write_workers(folders[:parts])
        for i, folder in enumerate(folders[parts:]):
            shutil.copytree(folders[i % parts], folder, copy_function=os.link)
        kept, kept_bytes = self._write_client(client, infos)
        return SplitResult(
            client=client,
            workers=tuple(folders),
            layers=len(self._chosen),
            outsourced=self._total,
            at_client=kept,
            client_bytes=kept_bytes,
            worker_bytes=tuple(self._bytes * self._placement.replicas),
            products=2 * len(self._groups),
            with_outliers=products_with_outliers([[infos[i] for i in group] for group in self._groups]),
            uncalibrated="",
        )

    def _write_workers(self, folders: Sequence[Path]) -> list[LayerInfo]:
        infos: dict[int, LayerInfo] = {}
        done = 0
        for group in (*self._groups, *self._tables):
            exact = [self._source.weight(self._chosen[i]) for i in group]
            weights = [self._quantized(self._chosen[i], weight) for i, weight in zip(group, exact, strict=True)]
            members = [describe(self._chosen[i].name, weight) for i, weight in zip(group, weights, strict=True)]
            members = keep_channels(members, exact, self._calibration)
            del exact
            infos |= dict(zip(group, members, strict=True))
            size = sum(weight.codes.numel() for weight in weights)
            for worker, folder in enumerate(folders):
                self._write_block(worker, folder, members, weights, (done + size / 2) / self._total)
            done += size
            del weights
            _give_back_memory()
            self._progress(done, self._total)
        for folder, blocks in zip(folders, self._blocks, strict=True):
            write_json(
                folder / WORKER_MANIFEST,
                {"format": WORKER_FORMAT, "model": published_name(self._source.name), "blocks": blocks},
            )
        return [infos[i] for i in range(len(self._chosen))]

    def _quantized(self, candidate: Candidate, exact: Tensor) -> LayerWeight:
        """A layer's weight in codes: those that it is stored as, where they are of the same kind."""
        stored = self._source.codes(candidate) if self._bits == 8 else None
        found = None if stored is None else adopt(*stored)
        return quantize_layer(candidate.name, exact, self._bits) if found is None else found

    def _write_block(
        self, worker: int, folder: Path, members: Sequence[LayerInfo], weights: Sequence[LayerWeight], place: float
    ) -> None:
        """A group's rows for one worker; ``place`` is where the group's middle lies in the model, from 0 to 1."""
        from safetensors.torch import save_file

        parts = []
        for info, weight in zip(members, weights, strict=True):
            start, stop = self._placement.rows_of(worker, info.out_features, place)
            if start < stop:
                parts.append((info.shard(start, stop), weight.codes[start:stop], _scale(weight)[start:stop]))
        if not parts:
            return
        name = f"layers/{len(self._blocks[worker]):05d}.safetensors"
        codes = _stacked([part for _, part, _ in parts])
        save_file({"codes": codes, "scale": _stacked([part for _, _, part in parts])}, folder / name)
        self._bytes[worker] += codes.nbytes
        self._blocks[worker].append({"file": name, "shards": [dataclasses.asdict(shard) for shard, _, _ in parts]})

    def _write_client(self, folder: Path, infos: Sequence[LayerInfo]) -> tuple[int, int]:
        from safetensors.torch import save_file

        self._source.save_companions(folder)
        weights, size = _write_kept(self._source, self._absent, folder)
        tables: dict[str, Tensor] = {}
        for info in infos:
            assert info.scale is not None
            tables[f"{info.name}.scale"] = info.scale.cpu()
            tables[f"{info.name}.digests"] = torch.frombuffer(bytearray(info.row_digests), dtype=torch.uint8)
            tables |= kept_tables(info)
        save_file(tables, folder / OUTSOURCED)
        write_json(
            folder / CLIENT_MANIFEST,
            {
                "format": CLIENT_FORMAT,
                "model": published_name(self._source.name),
                "architecture": self._source.architecture,
                "dtype": str(dtype_of(self._source.model)).removeprefix("torch."),
                "weight_bits": self._bits,
                "outsourced_weights": self._total,
                "client_weights": weights,
                "layers": [
                    {
                        "name": info.name,
                        "in_features": info.in_features,
                        "out_features": info.out_features,
                        "max_row_norm": info.max_row_norm,
                        "max_column_norm": info.max_column_norm,
                        "kept": info.kept is not None,
                    }
                    for info in infos
                ],
                "groups": [list(group) for group in self._groups],
                "embeddings": [] if self._table is None else [place.name for place in self._table.places],
            },
        )
        return weights, size


def _write_kept(source: Source, outsourced: set[str], folder: Path) -> tuple[int, int]:
    """Every tensor of the state dict but the outsourced weights, each once; how many values and bytes."""
    from safetensors.torch import save_file

    aliases = {name for group in tied_names(source.model) for name in [n for n in group if n not in outsourced][1:]}
    table: dict[str, str] = {}
    pending: dict[str, Tensor] = {}
    values = size = pending_bytes = files = 0

    def flush() -> None:
        nonlocal pending, pending_bytes, files
        if pending:
            files += 1
            name = f"model-{files:05d}.safetensors"
            save_file(pending, folder / name, metadata={"format": "pt"})
            table.update(dict.fromkeys(pending, name))
            pending, pending_bytes = {}, 0

    for name in source.model.state_dict():
        if name in outsourced or name in aliases:
            continue
        tensor = source.tensor(name).detach().cpu().contiguous()
        if pending and pending_bytes + tensor.nbytes > _CLIENT_FILE_BYTES:
            flush()
        # A view of a larger tensor would be refused.
        pending[name] = tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
        pending_bytes += tensor.nbytes
        values += tensor.numel()
        size += tensor.nbytes
    flush()
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": table})
    return values, size


def _scale(weight: LayerWeight) -> Tensor:
    assert weight.scale is not None
    return weight.scale


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    whole = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    return whole.cpu().contiguous().clone() if whole.untyped_storage().nbytes() != whole.nbytes else whole.cpu()


def _give_back_memory() -> None:
    """Return freed memory to the system: without this, freed blocks pile up between small ones that stay."""
    if sys.platform.startswith("linux"):
        # musl has no such call, and needs none.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
