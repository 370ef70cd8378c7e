"""The script that plays provider and data owner, with a tiny model: two workers, one of which is killed."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import remote
from shell_commands import forked_commands
from tiny import WORDS, save_words
from torch import nn

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(os.name != "posix", reason="a shell script")
def test_a_killed_worker_costs_nothing(tiny: Callable[[str], nn.Module], tmp_path: Path) -> None:
    model: Any = tiny("llama")
    model.save_pretrained(tmp_path / "model")
    save_words(tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(WORDS * 60))
    config = (ROOT / "examples" / "remote.toml").read_text()
    config = config.replace("language-reference", str(tmp_path / "text.txt")).replace("length = 128", "length = 12")
    config = config.replace("held_out = 0.02", "held_out = 0.2").replace("steps = 6", "steps = 40")
    (tmp_path / "remote.toml").write_text(config)
    with forked_commands(tmp_path / "bin") as path:
        run = subprocess.run(
            ["sh", ROOT / "examples" / "remote.sh", tmp_path / "model", tmp_path / "out", tmp_path / "remote.toml"],
            env={**os.environ, "PATH": path, "PORT": str(remote.free_port() // 2 * 2), "OMP_NUM_THREADS": "1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
    assert run.returncode == 0, run.stderr[-3000:]
    whole, split = re.findall(r"perplexity: ([\d.]+) on the original model, ([\d.]+) through the workers", run.stdout)[
        0
    ]
    # What stays between them is the rounding of weights to 8 bits, and the encryption's noise.
    assert float(whole) == pytest.approx(float(split), rel=0.05)
    assert (tmp_path / "out" / "out" / "adapter" / "adapter_model.safetensors").exists()
