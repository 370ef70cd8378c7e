"""The built-in hook plugins pass the suite that plugins are given, and what is broken does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from ciphertune.testing import PluginSuite


class TestProgress(PluginSuite):
    use = "progress"


class TestTraffic(PluginSuite):
    use = "traffic"


class TestTrafficFile(PluginSuite):
    use = "traffic?path=traffic.json"


class TestHistoryCsv(PluginSuite):
    use = "history?path=run/history.csv"


class TestHistoryJsonl(PluginSuite):
    use = "history?path=history.jsonl"


class TestTensorBoard(PluginSuite):
    use = "tensorboard?folder=run"


class TestPrometheus(PluginSuite):
    use = "prometheus?port=0"


class TestMLflow(PluginSuite):
    @pytest.fixture(autouse=True)
    def _store(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        monkeypatch.setattr(type(self), "use", f"mlflow?uri={(tmp_path / 'plugin' / 'store').as_uri()}", raising=False)
