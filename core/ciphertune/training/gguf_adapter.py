"""LoRA adapters of peft as files in GGUF form, as llama.cpp reads them.

Names, shapes and keys are those of llama.cpp's ``convert_lora_to_gguf.py``; the file is written by the package
``gguf``, whose tables give tensors their names.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ciphertune._support.atomic import draft_directory
from ciphertune._support.optional_imports import import_optional
from ciphertune.errors import ConfigError

_PREFIX = "base_model.model."
_PARTS = {".lora_A.weight": "lora_a", ".lora_B.weight": "lora_b"}
_FAMILIES = {
    "gemma": "GEMMA",
    "gemma2": "GEMMA2",
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "phi3": "PHI3",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
}
"""Architectures of ``gguf`` by the ``model_type`` of transformers, where llama.cpp changes linear layers by at most the
permutation below."""
_PERMUTED = ("llama", "mistral")
"""Where llama.cpp's rotary embedding turns neighbouring rows of a head, and transformers' rows half a head apart."""
_CANNOT_HOLD = {
    "use_dora": "DoRA's magnitudes",
    "lora_bias": "biases of adapters",
    "modules_to_save": "modules that were trained whole",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "adapters of single parameters",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "adapters that tokens switch on",
}


@dataclasses.dataclass(frozen=True)
class GgufAdapter:
    """What was written.

    Attributes:
        architecture: as llama.cpp names it.
        layers: with an adapter.
        alpha: llama.cpp multiplies with it, and divides by the rank.
        bytes: size of the file.
    """

    architecture: str
    layers: int
    alpha: float
    bytes: int


def write_gguf_adapter(
    file: Path, base: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> GgufAdapter:
    """Write an adapter in float32, and check the file by reading it.

    Args:
        file: replaced if it exists; whole or not at all.
        base: the model that the adapter is of, perhaps without weights.
        config: what ``adapter_config.json`` holds.
        tensors: what ``adapter_model.safetensors`` holds, by name.

    Raises:
        ConfigError: the adapter is of another model, or holds what such a file cannot; ``gguf`` is missing.
        OSError: the file cannot be written.
    """
    gguf = import_optional("gguf", 'pip install "ciphertune[demo]"')
    refuse(config)
    model_config: Any = base.config
    kind = str(model_config.model_type)
    if kind not in _FAMILIES:
        raise ConfigError(
            f"no GGUF adapter can be written for the architecture {kind!r}; for {', '.join(_FAMILIES)} it can. Merge "
            "the adapter into the model instead, and convert the folder with llama.cpp's convert_hf_to_gguf.py"
        )
    architecture = getattr(gguf.MODEL_ARCH, _FAMILIES[kind])
    names = gguf.get_tensor_name_map(architecture, model_config.num_hidden_layers)
    alpha = float(config["lora_alpha"])
    found: dict[str, Tensor] = {}
    for name, (a, b) in sorted(_pairs(tensors).items()):
        _check(name, a, b, base)
        stored = names.get_name(f"{name}.weight", try_suffixes=(".weight",))
        tied = name == "lm_head" and getattr(model_config, "tie_word_embeddings", False)
        if stored is None or tied:
            why = "it is tied to the embeddings" if tied else "llama.cpp has no such layer"
            raise ConfigError(f"a GGUF adapter cannot hold the adapter of {name!r}: {why}")
        # The file has one alpha for all layers, divided by the rank of each.
        factor = _scaling(config, name, a.shape[0]) * a.shape[0] / alpha if alpha else 0.0
        b = b * factor
        if kind in _PERMUTED and name.endswith(("q_proj", "k_proj")):
            heads = "num_attention_heads" if name.endswith("q_proj") else "num_key_value_heads"
            b = permuted(b, getattr(model_config, heads))
        found[f"{stored}.lora_a"], found[f"{stored}.lora_b"] = a, b.contiguous()
    size = _write(gguf, file, gguf.MODEL_ARCH_NAMES[architecture], alpha, found)
    return GgufAdapter(gguf.MODEL_ARCH_NAMES[architecture], len(found) // 2, alpha, size)


def refuse(config: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` for an adapter that holds more than pairs of matrices."""
    if config.get("peft_type") != "LORA":
        raise ConfigError(
            f"the adapter is of the kind {config.get('peft_type')}, and a GGUF adapter holds LORA alone: merge it into "
            "the model instead"
        )
    bias = config.get("bias", "none")
    held = [text for name, text in _CANNOT_HOLD.items() if config.get(name)]
    held += [f"biases (bias={bias!r})"] if bias != "none" else []
    if held:
        raise ConfigError(f"a GGUF adapter cannot hold {held[0]}: merge the adapter into the model instead")


def permuted(rows: Tensor, heads: int) -> Tensor:
    """Order the rows of a query or key projection as llama.cpp does.

    Args:
        rows: shape (out_features, any): of each head, the halves one after the other.
        heads: how many.

    Returns:
        The same rows, those of the two halves of a head in turn.

    >>> permuted(torch.tensor([[0], [1], [2], [3]]), heads=1).flatten().tolist()
    [0, 2, 1, 3]
    """
    out, columns = rows.shape
    return rows.reshape(heads, 2, out // heads // 2, columns).transpose(1, 2).reshape(out, columns)


def _pairs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by the name of the layer in the model, in float32."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.endswith(".base_layer.weight"):
            continue  # Of an output head with an adapter, peft keeps the model's own weight, too.
        end = next((end for end in _PARTS if key.endswith(end)), None)
        if end is None or not key.startswith(_PREFIX):
            raise ConfigError(f"a GGUF adapter cannot hold {key!r}: merge the adapter into the model instead")
        found.setdefault(key[len(_PREFIX) : -len(end)], {})[_PARTS[end]] = tensor.float()
    for name, parts in found.items():
        if len(parts) != len(_PARTS):
            raise ConfigError(f"the adapter is damaged: it has only one of the two matrices of {name!r}")
    return {name: (parts["lora_a"], parts["lora_b"]) for name, parts in found.items()}


def _check(name: str, a: Tensor, b: Tensor, base: nn.Module) -> None:
    layer = dict(base.named_modules()).get(name)
    if not isinstance(layer, nn.Linear):
        raise ConfigError(f"the adapter is of another model: this one has no linear layer {name!r}")
    shape = (b.shape[0], a.shape[1])
    if shape != (layer.out_features, layer.in_features) or a.shape[0] != b.shape[1]:
        raise ConfigError(
            f"the adapter is of another model: its {name!r} is of {shape[1]} to {shape[0]} features, and this model's "
            f"of {layer.in_features} to {layer.out_features}"
        )


def _scaling(config: Mapping[str, Any], name: str, rank: int) -> float:
    """What peft multiplies B A with."""
    from peft.utils.other import get_pattern_key

    patterns = config.get("alpha_pattern") or {}
    alpha = float(patterns.get(get_pattern_key(patterns.keys(), name), config["lora_alpha"]))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _write(gguf: Any, file: Path, architecture: str, alpha: float, tensors: Mapping[str, Tensor]) -> int:
    file.parent.mkdir(parents=True, exist_ok=True)
    with draft_directory(file) as draft:
        path = draft / file.name
        writer = gguf.GGUFWriter(path, architecture)
        try:
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
            writer.add_file_type(gguf.LlamaFileType.ALL_F32)
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            for name, tensor in tensors.items():
                writer.add_tensor(name, tensor.numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        _check_written(gguf, path, tensors)
        path.replace(file)
    return file.stat().st_size


def _check_written(gguf: Any, path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read a file and compare it with what was to be in it. Raises ``OSError``."""
    held = {tensor.name: torch.tensor(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
    if held.keys() != tensors.keys() or not all(torch.equal(held[name], tensors[name]) for name in tensors):
        raise OSError("what was written cannot be read back")
