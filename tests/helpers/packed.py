"""Checkpoints of tiny models whose linear weights are packed, by hand after each format's documented layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Pack = Callable[[Tensor], dict[str, Tensor]]
"""A weight (N, K) → what stands in its place, by the ends of the names behind the layer's."""


def fp8(weight: Tensor) -> dict[str, Tensor]:
    """8-bit floating point with a scale for every block of 16 by 16, as DeepSeek's are of 128 by 128."""
    n, k = (-(-size // 16) for size in weight.shape)
    padded = torch.zeros(n * 16, k * 16)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.view(n, 16, k, 16)
    scale = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).view_as(padded)[: weight.shape[0], : weight.shape[1]]
    return {"weight": codes.to(torch.float8_e4m3fn), "weight_scale_inv": scale}


FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}


def int8(weight: Tensor) -> dict[str, Tensor]:
    """int8 with one scale a row, as compressed-tensors has it; its codes reach from -128 to 127."""
    scale = weight.abs().amax(1, keepdim=True) / 127.5
    return {"weight": (weight / scale).round().clamp(-128, 127).to(torch.int8), "weight_scale": scale}


INT8 = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}},
}


def gptq(weight: Tensor) -> dict[str, Tensor]:
    """GPTQ in 4 bits, in the second version of its format, with groups of 8."""
    groups = weight.reshape(len(weight), -1, 8)
    low = groups.amin(-1)
    scale = (groups.amax(-1) - low) / 15
    zeros = (-low / scale).round().clamp(0, 15)
    codes = (groups / scale[..., None] + zeros[..., None]).round().clamp(0, 15).flatten(1)
    return {"qweight": _words(codes).t(), "qzeros": _words(zeros.t()), "scales": scale.t()}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 8, "checkpoint_format": "gptq_v2"}


def _words(codes: Tensor) -> Tensor:
    parts = codes.to(torch.int64).reshape(len(codes), -1, 8) << (4 * torch.arange(8))
    whole = parts.sum(-1)
    return torch.where(whole >= 1 << 31, whole - (1 << 32), whole).to(torch.int32)


def save(model: Any, folder: Path, pack: Pack, settings: dict[str, Any]) -> None:
    """Write a model of transformers, every matrix but embeddings and heads packed."""
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    stored: dict[str, Tensor] = {}
    for name, tensor in load_file(file).items():
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or tensor.dim() != 2 or "layers." not in name or module.endswith("gate"):
            stored[name] = tensor
            continue
        packed = pack(tensor.float())
        stored |= {f"{module}.{end}": value.contiguous() for end, value in packed.items()}
    save_file(stored, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
