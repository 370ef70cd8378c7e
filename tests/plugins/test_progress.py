"""The progress bar plugin."""

from __future__ import annotations

import io
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import ciphertune_progress
from ciphertune import LoraTrainer
from ciphertune.plugins.manager import PluginManager
from ciphertune.traffic import Exchange


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def make_terminal(monkeypatch):
    """To be called by the test itself: pytest sets standard error anew after fixtures ran."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "JUPYTER_COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    return stream


def shown(stream) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())


def trainer_of(loss_fn=nn.functional.mse_loss, **kwargs):
    manager = PluginManager()
    manager.register(ciphertune_progress, "progress")
    kwargs = {"require_outsourced": False, "require_adapter": False, **kwargs}
    return LoraTrainer(nn.Linear(2, 1), loss_fn=loss_fn, plugins=manager, **kwargs)


def data(count=4):
    return [(torch.ones(3, 2), torch.zeros(3, 1))] * count


def test_bar_shows_steps_loss_and_speed_up_to_the_end(monkeypatch):
    terminal = make_terminal(monkeypatch)
    history = trainer_of().train(data())
    text = shown(terminal)
    assert "4/4" in text
    assert f"loss {history.losses[-1]:.4f}" in text
    assert "samples/s" in text
    assert ciphertune_progress._bar is None


def test_a_key_on_its_way_is_shown_until_it_is_there(monkeypatch):
    terminal = make_terminal(monkeypatch)
    ciphertune_progress.ciphertune_sending_key("10.0.0.5:5555", 134_217_728, False)
    ciphertune_progress.ciphertune_sending_key("10.0.0.6:5555", 134_217_728, False)
    assert len(ciphertune_progress._keys) == 1, "the terminal has room for one"
    for worker in ("10.0.0.5:5555", "10.0.0.6:5555"):
        ciphertune_progress.ciphertune_sending_key(worker, 134_217_728, True)
    assert "sending a key of 134 MB to 10.0.0.5:5555" in shown(terminal)
    assert not ciphertune_progress._keys


def test_a_worker_that_stops_answering_is_told_of_once_and_when_it_is_back(monkeypatch, capsys):
    ciphertune_progress.ciphertune_worker_silent("10.0.0.5:5555", "10.0.0.5:5555: nothing answers there", 299.6)
    ciphertune_progress.ciphertune_worker_back("10.0.0.5:5555", 12.2)
    assert capsys.readouterr().err.splitlines() == [
        "10.0.0.5:5555 does not answer (nothing answers there); waiting up to 300 s for it or a replica",
        "10.0.0.5:5555 answers again after 12 s",
    ]
    terminal = make_terminal(monkeypatch)
    trainer = trainer_of()
    ciphertune_progress.ciphertune_training_start(trainer, 4, 0)
    exchange = Exchange(
        layers=("model.layers.3.self_attn.q_proj", "model.layers.3.self_attn.k_proj"), direction="backward", tokens=4
    )
    ciphertune_progress.ciphertune_before_request(exchange)
    assert ciphertune_progress._bar.doing() == "3.self_attn.q_proj + 1 backward"
    trainer.model.eval()
    ciphertune_progress.ciphertune_before_request(exchange)
    assert ciphertune_progress._bar.doing().startswith("evaluating: 3.self_attn")
    ciphertune_progress.ciphertune_worker_silent("10.0.0.5:5555", "no answer", 30.0)
    assert ciphertune_progress._bar.doing().startswith("waiting for 10.0.0.5:5555, ")
    ciphertune_progress.ciphertune_worker_back("10.0.0.5:5555", 1.0)
    assert ciphertune_progress._bar.doing().startswith("evaluating: ")
    ciphertune_progress.ciphertune_training_end(trainer)
    assert "10.0.0.5:5555 answers again after 1 s" in shown(terminal)


def test_one_trainer_after_another(monkeypatch):
    terminal = make_terminal(monkeypatch)
    trainer_of().train(data(3))
    trainer_of().train(data(5))
    assert "3/3" in shown(terminal)
    assert "5/5" in shown(terminal)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_failing_run_closes_its_bar_and_the_next_has_its_own(monkeypatch, error):
    terminal = make_terminal(monkeypatch)
    calls = []

    def loss_fn(outputs, targets):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return nn.functional.mse_loss(outputs, targets)

    stderr = sys.stderr
    with pytest.raises(error):
        trainer_of(loss_fn).train(data())
    assert ciphertune_progress._bar is None
    assert sys.stderr is stderr
    assert terminal.getvalue().endswith(("\n", "\x1b[?25h"))  # the cursor is back
    assert "2/4" in shown(terminal)
    trainer_of().train(data(5))
    assert "5/5" in shown(terminal)


def test_a_run_inside_a_run_takes_the_bar(monkeypatch):
    terminal = make_terminal(monkeypatch)
    inner = trainer_of()

    def loss_fn(outputs, targets):
        if not inner.history.steps:
            inner.train(data(5))
        return nn.functional.mse_loss(outputs, targets)

    trainer_of(loss_fn).train(data(3))
    assert "5/5" in shown(terminal)
    assert ciphertune_progress._bar is None


def test_a_resumed_run_shows_where_it_is(monkeypatch, tmp_path):
    terminal = make_terminal(monkeypatch)
    trainer_of(checkpoint_dir=tmp_path).train(data())
    terminal.truncate(0)
    terminal.seek(0)
    trainer_of(checkpoint_dir=tmp_path, epochs=2).train(data(), resume=True)
    text = shown(terminal)
    assert "8/8" in text
    assert "0/8" not in text


def test_silent_where_standard_error_is_no_terminal(monkeypatch):
    for stream in (io.StringIO(), None):
        monkeypatch.setattr(sys, "stderr", stream)
        trainer_of().train(data())
        assert stream is None or stream.getvalue() == ""


def test_importing_the_plugin_imports_nothing_heavy():
    code = "import ciphertune_progress, sys; print([m for m in ('torch', 'rich', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
