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
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(
    name: str, changes: dict[str, Tensor | None], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"the tensor 'layer\.\w+(\.\w+)*' cannot be unpacked"):
        opened(_named(name), tmp_path, **changes)[0]["layer.weight"]


@pytest.mark.parametrize(
    "name", ["bitsandbytes-int8", "compressed-int8-channel", "compressed-int8-packed", "gptq-8bit-channel"]
)
def test_codes_by_row_are_given_as_they_are(name: str, tmp_path: Path) -> None:
    tensors, expected = opened(_named(name), tmp_path)
    found = tensors.codes("layer.weight")
    assert found is not None
    codes, scale = found
    assert (codes.dtype, scale.dtype) == (torch.int8, torch.float32)
    torch.testing.assert_close(codes.float() * scale[:, None], expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["compressed-int8-asymmetric", "gptq-4bit", "fp8-block"])
def test_others_are_no_codes_by_row(name: str, tmp_path: Path) -> None:
    assert opened(_named(name), tmp_path)[0].codes("layer.weight") is None
