"""Channels with outliers in the client's part of a bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny as models
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import ciphertune
from ciphertune.bundle.worker import load_worker
from ciphertune.cli import cli
from ciphertune.errors import ConfigError
from ciphertune.models.load import load_tokenizer
from ciphertune.worker import Worker

TEXT = "the quick brown fox jumps over the lazy dog. " * 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with outliers in its input, a tokenizer of letters, and a text."""
    place = tmp_path_factory.mktemp("outliers") / "model"
    torch.manual_seed(0)
    model = models.llama(vocab_size=97, hidden_size=32, intermediate_size=48, tie_word_embeddings=False)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[5] = 500.0
    model.save_pretrained(place)
    models.save_letters(place)
    (place.parent / "text.txt").write_text(TEXT)
    return place


def client(place: Path, to: str = "mlwe") -> Any:
    return ciphertune.load_client(place / "client", to, worker=Worker(load_worker(place / "worker")))


def kept(model: Any) -> list[tuple[list[int], list[int]] | None]:
    found = [layer.info.kept for layer in ciphertune.outsourced_layers(model)]
    return [None if each is None else (each.inputs.tolist(), each.outputs.tolist()) for each in found]


def ids() -> torch.Tensor:
    return torch.randint(97, (1, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "in memory"])
def test_a_bundle_keeps_what_outsourcing_keeps(folder: Path, tmp_path: Path, streamed: bool) -> None:
    """And both compute the same, in float32 to the last bit."""
    text = folder.parent / "text.txt"
    result = ciphertune.split(str(folder), tmp_path / "out", calibration=text, in_memory=not streamed)
    assert 0 < result.with_outliers <= result.products
    assert result.uncalibrated == ""
    original = models.llama(vocab_size=97, hidden_size=32, intermediate_size=48, tie_word_embeddings=False)
    original.load_state_dict(type(original).from_pretrained(folder).state_dict())
    batches = ciphertune.public_batches(load_tokenizer(str(folder)), text)
    calibration = ciphertune.calibrate(original, batches)
    expected = ciphertune.outsource(original, "simulation", calibration=calibration)
    found = client(tmp_path / "out", "simulation")
    assert kept(found) == kept(expected)
    assert all(each is not None and 5 in each[0] for each in kept(found)[:3])
    for one, other in zip(ciphertune.outsourced_layers(found), ciphertune.outsourced_layers(expected), strict=True):
        if one.info.kept is not None:
            assert torch.equal(one.info.kept.columns.codes, other.info.kept.columns.codes)
            assert torch.equal(one.info.kept.rows.dequantize(), other.info.kept.rows.dequantize())
    with torch.no_grad():
        assert torch.equal(found(ids()).logits, expected(ids()).logits)


def test_it_trains_and_comes_nearer_to_the_model(folder: Path, tmp_path: Path) -> None:
    plain = models.llama(vocab_size=97, hidden_size=32, intermediate_size=48, tie_word_embeddings=False)
    plain.load_state_dict(type(plain).from_pretrained(folder).state_dict())
    plain.requires_grad_(False)
    results = []
    for name in ("off", "text.txt", "plain"):
        if name == "plain":
            model = plain
        else:
            text = name if name == "off" else folder.parent / name
            ciphertune.split(str(folder), tmp_path / name, calibration=text)
            model = client(tmp_path / name)
        embedded = model.get_input_embeddings()(ids()).detach().requires_grad_()
        model(inputs_embeds=embedded, labels=ids()).loss.backward()
        results.append(embedded.grad)
    off, on = (float((each - results[2]).norm() / results[2].norm()) for each in results[:2])
    assert on < 0.7 * off


def test_layers_that_share_no_products(folder: Path, tmp_path: Path) -> None:
    ciphertune.split(str(folder), tmp_path / "out", calibration=folder.parent / "text.txt")
    together, apart = (client(tmp_path / "out", to) for to in ("mlwe", "mlwe?share_inputs=0"))
    assert kept(together) == kept(apart)
    with torch.no_grad():
        one, other = together(ids()).logits, apart(ids()).logits
    assert float((one - other).norm() / one.norm()) < 0.05


def test_models_that_cannot_be_calibrated(tmp_path: Path) -> None:
    """The reason is told, unless a text was asked for."""
    models.llama().save_pretrained(tmp_path / "model")
    result = ciphertune.split(str(tmp_path / "model"), tmp_path / "out")
    assert "no tokenizer" in result.uncalibrated
    assert result.with_outliers == 0
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(ConfigError, match="no tokenizer"):
        ciphertune.split(str(tmp_path / "model"), tmp_path / "more", calibration=tmp_path / "text.txt")
    assert not (tmp_path / "more").exists()


def test_the_command(folder: Path, tmp_path: Path) -> None:
    def run(*options: str) -> str:
        arguments = ["split", str(folder), str(tmp_path / "out"), "--force", *options]
        result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return " ".join(result.output.split())

    assert "kept at the client in" in run()
    assert "none kept: calibration is off" in run("--calibration", "off")
    with pytest.raises(ConfigError, match=r"cannot read absent\.txt"):
        run("--calibration", "absent.txt")


@pytest.mark.parametrize(
    ("table", "change"),
    [
        ("inputs", None),
        ("inputs", lambda t: t.float()),
        ("inputs", lambda t: t + 32),
        ("inputs", lambda t: -t - 1),
        ("inputs", lambda t: torch.cat([t, t])),
        ("inputs", lambda t: torch.zeros(1000, dtype=torch.int64)),
        ("inputs", lambda t: (t + 1) % 32),
        ("columns", lambda t: t[:, 1:].contiguous()),
        ("columns", lambda t: t.int()),
        ("column_scales", lambda t: t * torch.nan),
        ("column_scales", lambda t: -t),
        ("rows", lambda t: t.float()),
        ("row_scales", lambda t: torch.ones(40)),
    ],
)
def test_damaged_tables(folder: Path, tmp_path: Path, table: str, change: Callable[..., torch.Tensor] | None) -> None:
    ciphertune.split(str(folder), tmp_path / "out", calibration=folder.parent / "text.txt")
    file = tmp_path / "out" / "client" / "outsourced.safetensors"
    tables = load_file(file)
    name = f"model.layers.0.self_attn.k_proj.kept.{table}"
    value = tables.pop(name)
    if change is not None:
        tables[name] = change(value)
    save_file(tables, file)
    with pytest.raises(ConfigError, match="damaged"):
        client(tmp_path / "out")
