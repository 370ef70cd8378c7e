"""Channels with outliers in runs: calibrated with public text, before any adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ciphertune
from ciphertune.errors import ConfigError
from ciphertune.outsourcing import calibration as calibrating, convert
from ciphertune.runs import train
from ciphertune.runs.config import load_config


def write(project: Path, *lines: str) -> Path:
    file = project / "run.toml"
    text = file.read_text().replace('to = "clear"', "\n".join(lines)).replace("steps = 8", "steps = 1")
    file.write_text(text)
    return file


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calibration of every model that is outsourced, and whether it was found without an adapter."""
    found: list[Any] = []
    outsource, calibrate = convert.outsource, calibrating.calibration_under

    def watched(*args: Any, calibration: Any, **others: Any) -> Any:
        found.append(calibration)
        return outsource(*args, calibration=calibration, **others)

    def before(backend: Any, model: Any, tokenizer: Any, text: Any, progress: Any) -> Any:
        assert not any("lora" in name for name, _ in model.named_parameters())
        return calibrate(backend, model, tokenizer, text, progress)

    monkeypatch.setattr(train, "outsource", watched)
    monkeypatch.setattr(train, "calibration_under", before)
    return found


@pytest.mark.parametrize(
    ("lines", "calibrated"),
    [
        (['to = "simulation"'], True),
        (['to = "simulation"', 'calibration = "text.txt"'], True),
        (['to = "simulation"', 'calibration = "off"'], False),
        (['to = "clear"'], False),
    ],
)
def test_a_run_calibrates(project: Path, given: list[Any], lines: list[str], calibrated: bool) -> None:
    told: list[str] = []
    train.run_training(load_config(write(project, *lines)), progress=told.append)
    assert [each is not None for each in given] == [calibrated]
    if calibrated:
        assert "model.layers.0.self_attn.q_proj" in given[0].inputs
        assert given[0].outputs.keys() == given[0].inputs.keys()
    assert any("calibration is off" in line for line in told) == ('calibration = "off"' in lines)


def test_a_text_that_is_not_there(project: Path) -> None:
    file = write(project, 'to = "simulation"', 'calibration = "absent.txt"')
    with pytest.raises(ConfigError, match=r"cannot read absent\.txt"):
        train.run_training(load_config(file))


def test_a_bundle_was_calibrated_before(project: Path) -> None:
    ciphertune.split(str(project / "model"), project / "bundle")
    file = write(project, 'to = "mlwe"', 'calibration = "text.txt"')
    file.write_text(file.read_text().replace('name = "model"', 'name = "bundle/client"'))
    with pytest.raises(ConfigError, match="calibrated when it was split"):
        train.run_training(load_config(file))
