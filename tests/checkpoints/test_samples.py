"""Packed weights, made by each format's own packer, are what that packer's own unpacking gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ciphertune.checkpoints.tensors import PlainTensors
from ciphertune.errors import ConfigError

SAMPLES = sorted((Path(__file__).parent / "samples").glob("*.safetensors"))


def opened(sample: Path, folder: Path, **changes: Tensor | None) -> tuple[PlainTensors, Tensor]:
    """A sample as a checkpoint, with some tensors changed, and what its packer says that it stands for."""
    with safe_open(sample, framework="pt") as file:
        settings: dict[str, Any] = json.loads(file.metadata()["settings"])
    tensors = load_file(sample)
    expected = tensors.pop("expected")
    for name, value in changes.items():
        tensors.pop(f"layer.{name}")
        if value is not None:
            tensors[f"layer.{name}"] = value
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
    return PlainTensors(folder), expected


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.stem)
def test_unpacked_as_its_packer_does(sample: Path, tmp_path: Path) -> None:
    tensors, expected = opened(sample, tmp_path)
    assert list(tensors) == ["layer.weight"]
    found = tensors["layer.weight"]
    assert found.shape == expected.shape
    torch.testing.assert_close(found.float(), expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.stem)
def test_without_its_settings_nothing_is_read_as_raw_numbers(sample: Path, tmp_path: Path) -> None:
    opened(sample, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"the tensor 'layer\.\w+(\.\w+)*' cannot be unpacked"):
        PlainTensors(tmp_path)


# After quanto's qint4, torchao's tiles for a kernel, and an activation's scale of SmoothQuant.
@pytest.mark.parametrize(
    ("method", "tensors"),
    [
        ("quanto", {"weight._data._data": torch.zeros(16, 96, dtype=torch.uint8), "weight._shift": torch.zeros(32, 1)}),
        ("torchao", {"_weight_packed_weight": torch.zeros(4, 2, 32, 4, dtype=torch.int32)}),
        ("torchao", {"_weight_qdata": torch.zeros(32, 96, dtype=torch.int8), "_weight_act_pre_scale": torch.ones(96)}),
        ("modelopt", {"weight": torch.zeros(32, 48, dtype=torch.uint8)}),
        ("hqq", {"W_q": torch.zeros(16, 96, dtype=torch.uint8)}),
        ("spqr", {"dense_weights": torch.zeros(16, 96, dtype=torch.int64)}),
    ],
)
def test_other_kinds_are_refused_by_tensor(method: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    save_file({f"layer.{name}": value for name, value in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))
    with pytest.raises(ConfigError, match=r"the tensor 'layer\.\w+(\.\w+)*' cannot be unpacked: .*Take the model in"):
        PlainTensors(tmp_path)


def _named(name: str) -> Path:
    return next(sample for sample in SAMPLES if sample.stem == name)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("awq", {"qweight": None}),
        ("awq", {"qzeros": None}),
        ("awq", {"scales": torch.ones(3, 16)}),
        ("gptq-4bit", {"qzeros": torch.zeros(3, 8, dtype=torch.int32)}),
        ("gptq-4bit-act-order", {"g_idx": torch.full((96,), 3, dtype=torch.int32)}),
        ("bitsandbytes-nf4", {"weight.absmax": torch.ones(5)}),
        ("bitsandbytes-nf4", {"weight.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)}),
        ("bitsandbytes-nf4-nested", {"weight.nested_absmax": torch.ones(1)}),
        ("bitsandbytes-int8", {"SCB": torch.ones(31)}),
        ("bitsandbytes-int8", {"weight_format": torch.ones((), dtype=torch.uint8)}),
        ("compressed-int4-group", {"weight_shape": torch.tensor([32, 1 << 40])}),
        ("compressed-int4-group", {"weight_shape": torch.tensor([64, 96])}),
        ("compressed-int4-asymmetric", {"weight_zero_point": torch.zeros(8, 3, dtype=torch.int32)}),
        ("compressed-int8-channel", {"weight_scale": torch.ones(31, 1)}),
        ("compressed-fp8-block", {"weight_scale": torch.ones(2, 3)}),
        ("fp8-block", {"weight_scale_inv": None}),
        ("mxfp4", {"weight_scales": torch.ones(2, 32, 2, dtype=torch.uint8)}),
        ("compressed-nvfp4", {"weight_global_scale": None}),
        ("compressed-nvfp4", {"weight_scale": torch.ones(32, 6)}),
        ("modelopt-nvfp4", {"weight_scale_2": torch.ones(2)}),
        ("modelopt-nvfp4", {"weight_scale": torch.ones(32, 5).to(torch.float8_e4m3fn)}),
        ("torchao-int8", {"_weight_scale": torch.ones(31, 1)}),
        ("torchao-int8", {"_weight_qdata": torch.zeros(32, 96, dtype=torch.uint8)}),
        ("torchao-int8", {"_weight_qdata": None}),
        ("torchao-int4-group", {"_weight_zero_point": torch.zeros(32, 2, dtype=torch.int8)}),
        ("hqq-4bit", {"W_q": torch.zeros(5, 32, dtype=torch.int32)}),
        ("hqq-4bit", {"shape": torch.tensor([32, 1 << 40])}),
        ("hqq-4bit", {"scale": None}),
        ("hqq-4bit", {"quant_scale": torch.ones((), dtype=torch.uint8)}),
        ("quanto-int8", {"weight._scale": torch.ones(32)}),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(
    name: str, changes: dict[str, Tensor | None], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"the tensor 'layer\.\w+(\.\w+)*' cannot be unpacked"):
        opened(_named(name), tmp_path, **changes)[0]["layer.weight"]


@pytest.mark.parametrize(
    "name",
    [
        "bitsandbytes-int8",
        "compressed-int8-channel",
        "compressed-int8-packed",
        "gptq-8bit-channel",
        "quanto-int8",
        "torchao-int8",
    ],
)
def test_codes_by_row_are_given_as_they_are(name: str, tmp_path: Path) -> None:
    tensors, expected = opened(_named(name), tmp_path)
    found = tensors.codes("layer.weight")
    assert found is not None
    codes, scale = found
    assert (codes.dtype, scale.dtype) == (torch.int8, torch.float32)
    torch.testing.assert_close(codes.float() * scale[:, None], expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(
    "name", ["compressed-int8-asymmetric", "gptq-4bit", "fp8-block", "hqq-8bit", "torchao-int4-group"]
)
def test_others_are_no_codes_by_row(name: str, tmp_path: Path) -> None:
    assert opened(_named(name), tmp_path)[0].codes("layer.weight") is None
