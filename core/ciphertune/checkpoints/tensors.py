"""A checkpoint as if it were stored in plain floating point: packed tensors are unpacked when they are read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ciphertune.checkpoints.awq import awq
from ciphertune.checkpoints.bnb import bitsandbytes
from ciphertune.checkpoints.compressed import compressed
from ciphertune.checkpoints.files import TensorFiles, checkpoint_files
from ciphertune.checkpoints.floats import fp8
from ciphertune.checkpoints.fours import modelopt
from ciphertune.checkpoints.gptq import gptq
from ciphertune.checkpoints.hqq import hqq
from ciphertune.checkpoints.mxfp4 import mxfp4
from ciphertune.checkpoints.packed import Format, Packed, fail
from ciphertune.checkpoints.torchao import quanto, torchao
from ciphertune.errors import ConfigError

FORMATS: dict[str, Format] = {
    "awq": awq,
    "bitsandbytes": bitsandbytes,
    "compressed-tensors": compressed,
    "fbgemm_fp8": fp8,
    "fp8": fp8,
    "gptq": gptq,
    "hqq": hqq,
    "modelopt": modelopt,
    "mxfp4": mxfp4,
    "quanto": quanto,
    "torchao": torchao,
}
"""What ``quantization_config.quant_method`` of a model may be."""

PLAIN = ("F64", "F32", "F16", "BF16")
"""Floating-point numbers that stand for themselves."""

_NEVER_PLAIN = ("F4", "F6_E2M3", "F6_E3M2", "F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U16", "U32", "U64")
"""What no model of transformers keeps anything in that is not packed."""
_BESIDE = (
    "W_q", "_data", "_scale", "_shift", "_weight_qdata", "_weight_scale", "absmax", "qweight", "qzeros", "quant_map",
    "SCB", "scale_weight", "weight_global_scale", "weight_packed", "weight_scale", "weight_scale_2",
    "weight_scale_inv", "weight_zero_point", "weight_g_idx",
)  # fmt: skip
"""Names of what stands beside packed weights, in formats that are known and in others."""
_LARGEST_CONFIG = 1 << 24
_ALONE = (("quantize_config.json", "gptq"), ("quant_config.json", "awq"))
"""Files with the settings, as early tools wrote them, and the method that they stand for."""


class PlainTensors:
    """The tensors of a folder with safetensors, by the names that they have once they are unpacked.

    Args:
        folder: of a model.

    Attributes:
        packed: names of those that are stored packed.

    Raises:
        ConfigError: a file is damaged, or holds a tensor that is stored in a way that is not known; the message names
            it. It is never read as if its numbers were the tensor's.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = TensorFiles(checkpoint_files(folder))
        self._headers = self._files.headers()
        settings = packing(folder)
        self._packed = {} if settings is None else self._claimed(settings)
        used = {part for each in self._packed.values() for part in each.parts}
        rest = {name: header for name, header in self._headers.items() if name not in used}
        for name, header in rest.items():
            blocks = header.dtype == "U8" and name.endswith(("_blocks", "_scales"))
            if header.dtype in _NEVER_PLAIN or blocks or name.rpartition(".")[2] in _BESIDE:
                how = "no settings of a packed format are known" if settings is None else f"{_method(settings)!r}"
                raise fail(name, f"it is stored as {header.dtype} and packed in a way that is not known ({how})")
        self._names = dict.fromkeys([*rest, *self._packed])
        self.packed = frozenset(self._packed)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __getitem__(self, name: str) -> Tensor:
        """A tensor: a memory-mapped one, or what a packed one stands for, in float32 or what holds it exactly.

        Raises:
            ConfigError: a file is damaged, or a packed tensor does not fit its tables.
        """
        packed = self._packed.get(name)
        return self._files[name] if packed is None else packed.unpack(self._files.__getitem__)

    def codes(self, name: str) -> tuple[Tensor, Tensor] | None:
        """The (N, K) int8 codes and (N,) float32 scales that a tensor is stored as, None if it is not."""
        packed = self._packed.get(name)
        return None if packed is None or packed.codes is None else packed.codes(self._files.__getitem__)

    def is_floating(self, name: str) -> bool:
        """Whether a tensor is stored as floating-point numbers, or packed."""
        return name in self._packed or self._headers[name].dtype in PLAIN

    def dtype(self, name: str) -> str:
        """The dtype that a tensor is stored in, as safetensors names it."""
        return self._headers[name].dtype if name in self._headers else "packed"

    def _claimed(self, settings: Mapping[str, Any]) -> dict[str, Packed]:
        method = _method(settings)
        form = FORMATS.get(method)
        if form is None:
            name = next((n for n, h in self._headers.items() if h.dtype not in PLAIN or _is_beside(n)), None)
            raise fail(
                name or next(iter(self._headers), "weight"),
                f"the model is packed as {method!r}, and {', '.join(sorted(FORMATS))} are known",
            )
        return form(self._headers, settings)


def packing(folder: Path) -> dict[str, Any] | None:
    """How the weights of a model's folder are packed: its ``quantization_config``; None for one that is not packed.

    Raises:
        ConfigError: a file with settings is damaged.
    """
    config = _read(folder / "config.json") or {}
    for place in (config, config.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            found = place.get(key) if isinstance(place, dict) else None
            if isinstance(found, dict):
                return found
    for name, method in _ALONE:
        alone = _read(folder / name)
        if alone is not None:
            return {"quant_method": method, **alone}
    return None


def _method(settings: Mapping[str, Any]) -> str:
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        return "bitsandbytes"
    return "compressed-tensors" if method is None and "config_groups" in settings else str(method)


def _is_beside(name: str) -> bool:
    return name.rpartition(".")[2] in _BESIDE


def _read(file: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is no file. Raises ``ConfigError``."""
    try:
        if file.stat().st_size > _LARGEST_CONFIG:
            raise ConfigError(f"{file} is too large for settings")
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is damaged: it is no JSON") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} is damaged: it holds no JSON object")
    return content
