"""Write the samples of packed weights beside this file, each by its format's own packer and unpacked by it.

Not part of the tests: it needs what packs, each in a folder that PYTHONPATH names, since they ask for packages that the
tests' environment has otherwise. The samples were made by bitsandbytes 0.50.2, compressed-tensors 0.20.0, auto-gptq
0.7.1, autoawq 0.2.9, torchao 0.18.0, hqq 0.2.8, optimum-quanto 0.2.7, and transformers 5.24 (``fp8`` and ``mxfp4``).
``modelopt-nvfp4`` holds what compressed-tensors packed, in ModelOpt's names and with its number turned round.

    PYTHONPATH=FOLDER python tests/checkpoints/make_samples.py NAME …
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

HERE = Path(__file__).parent / "samples"
N, K = 32, 96


def layer(n: int = N, k: int = K) -> Any:
    torch.manual_seed(0)
    made = nn.Linear(k, n, bias=False)
    nn.init.normal_(made.weight, std=0.3)
    return made


def write(name: str, tensors: dict[str, Tensor], expected: Tensor, settings: dict[str, Any]) -> None:
    stored = {f"layer.{key}": value.detach().contiguous().clone() for key, value in tensors.items()}
    stored["expected"] = expected.detach().float().contiguous()
    save_file(stored, HERE / f"{name}.safetensors", metadata={"settings": json.dumps(settings)})


def package(name: str) -> Any:
    """A package whose own ``__init__`` asks for too much: its modules, without that."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    found = types.ModuleType(name)
    found.__path__ = list(spec.submodule_search_locations or ())
    sys.modules[name] = found
    return found


def bitsandbytes() -> None:
    bnb = importlib.import_module("bitsandbytes")

    # The last has more than one block of packed scales.
    for kind, nested, n, k in (("nf4", False, N, K), ("fp4", False, N, K), ("nf4", True, 160, 128)):
        made = bnb.nn.Linear4bit(k, n, bias=False, quant_type=kind, compute_dtype=torch.float32)
        made.weight = bnb.nn.Params4bit(
            layer(n, k).weight.data, requires_grad=False, quant_type=kind, compress_statistics=nested
        )
        made.to("cpu")
        expected = bnb.functional.dequantize_4bit(made.weight.data, made.weight.quant_state)
        settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
        write(f"bitsandbytes-{kind}{'-nested' * nested}", dict(made.state_dict()), expected, settings)
    made = bnb.nn.Linear8bitLt(K, N, bias=False, has_fp16_weights=False)
    made.weight = bnb.nn.Int8Params(layer().weight.data, requires_grad=False, has_fp16_weights=False)
    made.to("cpu")
    state = dict(made.state_dict())
    expected = bnb.functional.int8_vectorwise_dequant(state["weight"], state["SCB"])
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    write("bitsandbytes-int8", state, expected, settings)


def compressed_tensors() -> None:
    naive = importlib.import_module("compressed_tensors.compressors.naive_quantized.base")
    whole, floating = naive.IntQuantizationCompressor, naive.FloatQuantizationCompressor
    packing = importlib.import_module("compressed_tensors.compressors.pack_quantized.base").PackedQuantizationCompressor
    quantization = importlib.import_module("compressed_tensors.quantization")
    calculate_qparams = importlib.import_module("compressed_tensors.quantization.utils").calculate_qparams

    kinds: list[tuple[str, Any, dict[str, Any]]] = [
        ("int8-channel", whole, {"num_bits": 8, "strategy": "channel"}),
        ("int8-asymmetric", whole, {"num_bits": 8, "strategy": "channel", "symmetric": False}),
        ("int4-group", packing, {"num_bits": 4, "strategy": "group", "group_size": 32}),
        (
            "int4-asymmetric",
            packing,
            {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
        ),
        ("int8-packed", packing, {"num_bits": 8, "strategy": "channel"}),
        ("fp8-channel", floating, {"num_bits": 8, "type": "float", "strategy": "channel"}),
        ("fp8-tensor", floating, {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        (
            "fp8-block",
            floating,
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 32]},
        ),
    ]
    for name, compressor, given in kinds:
        arguments = quantization.QuantizationArgs(**given)
        weight = layer().weight.data
        size = given.get("group_size", K)
        if given["strategy"] == "tensor":
            low, high = weight.amin().reshape(1), weight.amax().reshape(1)
        elif given["strategy"] == "block":
            blocks = weight.unflatten(1, (-1, 32)).unflatten(0, (-1, 32))
            low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
        else:
            groups = weight.unflatten(1, (-1, size))
            low, high = groups.amin(-1), groups.amax(-1)
        scale, zero = calculate_qparams(low, high, arguments)
        scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        packed = compressor.compress(state, scheme)
        packed = {key: value for key, value in packed.items() if value is not None}
        if arguments.symmetric:
            packed.pop("weight_zero_point", None)
        expected = compressor.decompress(dict(packed), scheme)["weight"]
        settings = {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": given}},
        }
        write(f"compressed-{name}", packed, expected, settings)


def tables(bits: int, size: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales and zero points, (N, groups)."""
    groups = layer().weight.data.unflatten(1, (-1, size))
    top = 2**bits - 1
    if symmetric:
        scale = groups.abs().amax(-1) * 2 / top
        return scale.half().float(), torch.full_like(scale, (top + 1) // 2)
    low = groups.amin(-1)
    scale = ((groups.amax(-1) - low) / top).half().float()
    return scale, (-low / scale).round().clamp(1, top)


def auto_gptq() -> None:
    package("auto_gptq")
    package("auto_gptq.nn_modules")
    package("auto_gptq.nn_modules.qlinear")
    kernel = importlib.import_module("auto_gptq.nn_modules.qlinear.qlinear_cuda")
    for name, bits, size, symmetric, act in (
        ("4bit", 4, 32, False, False),
        ("4bit-act-order", 4, 32, False, True),
        ("3bit", 3, 32, False, False),
        ("8bit-channel", 8, K, True, False),
    ):
        made = kernel.QuantLinear(bits, size, K, N, False)
        scale, zero = tables(bits, size, symmetric)
        index = torch.arange(K) // size
        if act:
            index = index[torch.randperm(K, generator=torch.Generator().manual_seed(1))].to(torch.int32)
        made.pack(layer(), scale.clone(), zero.clone(), index.to(torch.int32))
        state = dict(made.state_dict())
        made.scales = made.scales.float()
        expected = made(torch.eye(K)).t()
        settings = {"quant_method": "gptq", "bits": bits, "group_size": size if size < K else -1, "desc_act": act}
        write(f"gptq-{name}", state, expected, settings)


def autoawq() -> None:
    for each in ("awq", "awq.utils", "awq.modules", "awq.modules.linear"):
        package(each)
    kernel = importlib.import_module("awq.modules.linear.gemm")
    packing = importlib.import_module("awq.utils.packing_utils")
    scale, zero = tables(4, 32, symmetric=False)
    made = kernel.WQLinear_GEMM.from_linear(layer(), 4, 32, scales=scale.t().contiguous(), zeros=zero.t().contiguous())
    expected = packing.dequantize_gemm(made.qweight, made.qzeros, made.scales.float(), 4, 32).t()
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    write("awq", dict(made.state_dict()), expected, settings)


def transformers() -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Quantize, _dequantize_fp8_weight
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors
    from transformers.utils.quantization_config import FineGrainedFP8Config

    quantizer = types.SimpleNamespace(quantization_config=FineGrainedFP8Config(weight_block_size=(32, 32)))
    made = Fp8Quantize(quantizer).convert({"weight": [layer().weight.data]})
    expected = _dequantize_fp8_weight(made["weight"], made["weight_scale_inv"], (32, 32), torch.float32)
    settings = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    write("fp8-block", made, expected, settings)
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, N, K // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(118, 128, (2, N, K // 32), generator=generator, dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales)
    write("mxfp4", {"weight_blocks": blocks, "weight_scales": scales}, expected, {"quant_method": "mxfp4"})


def fours() -> None:
    quantization = importlib.import_module("compressed_tensors.quantization")
    utils = importlib.import_module("compressed_tensors.quantization.utils")
    packer = importlib.import_module("compressed_tensors.compressors.nvfp4.base").NVFP4PackedCompressor
    given = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=quantization.QuantizationArgs(**given))
    weight = layer().weight.data
    whole = utils.generate_gparam(weight.amin().reshape(1), weight.amax().reshape(1))
    groups = weight.unflatten(1, (-1, 16))
    scale, _ = utils.calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights, global_scale=whole)
    packed = packer.compress({"weight": weight, "weight_scale": scale, "weight_global_scale": whole}, scheme)
    packed = {key: value for key, value in packed.items() if key != "weight_zero_point" and value is not None}
    unpack = importlib.import_module("compressed_tensors.compressors.nvfp4.helpers").unpack_fp4_from_uint8
    dequantize = importlib.import_module("compressed_tensors.quantization.lifecycle.forward").dequantize
    # In float32: what the packer itself gives is rounded to bfloat16.
    values = unpack(packed["weight_packed"], N, K, torch.float32)
    expected = dequantize(values, packed["weight_scale"].float(), args=scheme.weights, global_scale=whole)
    groups_of = {"group_0": {"targets": ["Linear"], "weights": given}}
    write("compressed-nvfp4", packed, expected, {"quant_method": "compressed-tensors", "config_groups": groups_of})
    other = {"weight": packed["weight_packed"], "weight_scale": packed["weight_scale"]}
    number = 1 / packed["weight_global_scale"].reshape(())
    settings = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    write("modelopt-nvfp4", {**other, "weight_scale_2": number}, expected, settings)


def torchao() -> None:
    quantization = importlib.import_module("torchao.quantization")
    support = importlib.import_module("torchao.prototype.safetensors.safetensors_support")
    by_group = {"weight_dtype": getattr(torch, "int4"), "granularity": quantization.granularity.PerGroup(32)}  # noqa: B009
    for name, given in (
        ("int8", quantization.Int8WeightOnlyConfig(version=2)),
        ("float8", quantization.Float8WeightOnlyConfig()),
        ("int4-group", quantization.IntxWeightOnlyConfig(**by_group)),
    ):
        made = nn.Sequential()
        made.add_module("layer", layer())
        quantization.quantize_(made, given)
        state, _ = support.flatten_tensor_state_dict(made.state_dict())
        state = {key.removeprefix("layer."): value for key, value in state.items()}
        write(f"torchao-{name}", state, made.layer.weight.dequantize(), {"quant_method": "torchao"})


def hqq() -> None:
    quantize = importlib.import_module("hqq.core.quantize")
    for name, bits, size, axis in (
        ("8bit", 8, 32, 1),
        ("4bit", 4, 32, 1),
        ("4bit-columns", 4, 32, 0),
        ("2bit", 2, 16, 1),
    ):
        config = quantize.BaseQuantizeConfig(nbits=bits, group_size=size, axis=axis)
        made = quantize.HQQLinear(layer(), config, compute_dtype=torch.float32, device="cpu")
        write(f"hqq-{name}", dict(made.state_dict()), made.dequantize(), {"quant_method": "hqq"})


def quanto() -> None:
    package = importlib.import_module("optimum.quanto")
    for name, kind in (("int8", package.qint8), ("float8", package.qfloat8)):
        made = nn.Sequential()
        made.add_module("layer", layer())
        package.quantize(made, weights=kind)
        package.freeze(made)
        state = {key.removeprefix("layer."): value for key, value in made.state_dict().items()}
        write(f"quanto-{name}", state, made.layer.weight.dequantize(), {"quant_method": "quanto"})


MAKERS = (bitsandbytes, compressed_tensors, auto_gptq, autoawq, transformers, fours, torchao, hqq, quanto)

if __name__ == "__main__":
    for make in MAKERS:
        if make.__name__ in sys.argv[1:]:
            make()
