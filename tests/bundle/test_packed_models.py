"""Models whose checkpoints are packed: split and loaded as the numbers that they stand for, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import packed
import pytest
import small
import tiny as models
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ciphertune
from ciphertune.bundle.worker import load_worker
from ciphertune.checkpoints.tensors import PlainTensors
from ciphertune.errors import ConfigError
from ciphertune.models.load import load_named_model
from ciphertune.worker import Worker

FORMATS: dict[str, tuple[packed.Pack, dict[str, Any]]] = {
    "fp8": (packed.fp8, packed.FP8),
    "int8": (packed.int8, packed.INT8),
    "gptq": (packed.gptq, packed.GPTQ),
}


def logits(model: Any) -> Tensor:
    ids = torch.randint(48, (2, 10), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


def client(bundle: Any, bits: int = 8) -> Any:
    worker = Worker(load_worker(bundle.workers[0]))
    return ciphertune.load_client(bundle.client, f"clear?weight_bits={bits}", worker=worker)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.fixture(params=list(FORMATS))
def folder(request: Any, tmp_path: Path) -> Path:
    """A packed tiny Llama."""
    torch.manual_seed(0)
    model = models.llama(hidden_size=32, intermediate_size=64)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    packed.save(model, tmp_path / "model", *FORMATS[request.param])
    return tmp_path / "model"


def test_split_and_the_loaded_model_agree(folder: Path, tmp_path: Path) -> None:
    models.save_words(folder)
    plain, _ = load_named_model(str(folder))
    assert plain.config.to_dict().get("quantization_config") is None
    file = PlainTensors(folder)
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, file[name].float())
    bundle = ciphertune.split(str(folder), tmp_path / "bundle", weight_bits=16)
    assert bundle.uncalibrated == ""
    assert error(logits(client(bundle, 16)), logits(plain)) < 1e-3
    assert "quantization_config" not in json.loads((bundle.client / "config.json").read_text())
    assert {each.name for each in bundle.client.parent.iterdir()} == {"client", "worker"}


def test_a_layer_that_stays_is_unpacked(folder: Path, tmp_path: Path) -> None:
    bundle = ciphertune.split(str(folder), tmp_path / "bundle", layers=["*.mlp.*"], calibration="off")
    model = client(bundle)
    stays = model.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(stays, PlainTensors(folder)["model.layers.0.self_attn.q_proj.weight"])


@pytest.mark.parametrize("folder", ["int8"], indirect=True)
def test_int8_codes_by_row_go_through_unchanged(folder: Path, tmp_path: Path) -> None:
    bundle = ciphertune.split(str(folder), tmp_path / "bundle", calibration="off")
    store = load_worker(bundle.workers[0])
    stored = load_file(folder / "model.safetensors")
    rounded = 0
    for layer in ciphertune.outsourced_layers(client(bundle)):
        codes, scale = stored[f"{layer.name}.weight"], stored[f"{layer.name}.weight_scale"][:, 0]
        same = (codes != -128).all(dim=1)
        assert torch.equal(store[layer.name][same], codes[same])
        assert torch.equal(layer.info.scale[same], scale[same])
        # Workers' codes end at ±127: rows that hold -128 are rounded again.
        again = store[layer.name][~same].float() * layer.info.scale[~same, None]
        exact = codes[~same].float() * scale[~same, None]
        assert bool(((again - exact).abs() <= 0.51 * layer.info.scale[~same, None]).all())
        rounded += int((~same).sum())
    assert rounded > 0


def test_experts_that_are_packed_one_by_one_are_merged(tmp_path: Path) -> None:
    plain = small.model("MixtralForCausalLM", num_local_experts=2, num_experts_per_tok=1, num_key_value_heads=2)
    packed.save(plain, tmp_path / "model", packed.fp8, packed.FP8)
    loaded, _ = load_named_model(str(tmp_path / "model"), whole=True)
    bundle = ciphertune.split(str(tmp_path / "model"), tmp_path / "bundle", weight_bits=16)
    with torch.no_grad():
        wanted = loaded(input_ids=small.ids()).logits
        assert error(client(bundle, 16)(input_ids=small.ids()).logits, wanted) < 1e-3
        assert 0 < error(wanted, plain(input_ids=small.ids()).logits) < 0.2


def change(folder: Path, rename: Any = None, **settings: Any) -> None:
    if rename is not None:
        tensors = load_file(folder / "model.safetensors")
        save_file(dict(filter(None, (rename(*each) for each in tensors.items()))), folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings
    config = {key: value for key, value in config.items() if settings or key != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(config))


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("folder", ["fp8"], indirect=True)
@pytest.mark.parametrize(
    ("rename", "settings", "message"),
    [
        (None, {}, "down_proj.weight' cannot be unpacked: it is stored as F8_E4M3"),
        (None, {"quant_method": "quip"}, "cannot be unpacked: the model is packed as 'quip'"),
        (lambda n, t: None if n == f"{Q}.weight_scale_inv" else (n, t), FORMATS["fp8"][1], f"'{Q}.weight' cannot be"),
        (lambda n, t: (n, t[:1] if n == f"{Q}.weight_scale_inv" else t), FORMATS["fp8"][1], "its scale of shape"),
        (lambda n, t: (n.replace("q_proj.weight_scale_inv", "q_proj.weight_scale_2"), t), {"quant_method": "fp8"}, Q),
    ],
)
def test_unknown_storage_is_refused_by_tensor(
    folder: Path, tmp_path: Path, rename: Any, settings: dict[str, Any], message: str
) -> None:
    models.save_words(folder)
    change(folder, rename, **settings)
    with pytest.raises(ConfigError, match=message):
        ciphertune.split(str(folder), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    with pytest.raises(ConfigError, match=message):
        load_named_model(str(folder))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (f"{Q}.weight", torch.zeros(16, 16, dtype=torch.int32), f"'{Q}.weight' in .* is stored as I32"),
        (f"{Q}.outer_scale", torch.ones(16), f"'{Q}.outer_scale' in .* stands beside a weight"),
    ],
)
def test_numbers_that_a_model_has_no_use_for_are_refused(
    tmp_path: Path, name: str, value: Tensor, message: str
) -> None:
    models.llama().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file({**load_file(file), name: value}, file)
    with pytest.raises(ConfigError, match=message):
        ciphertune.split(str(tmp_path / "model"), tmp_path / "bundle")
