"""Plugins found by name through entry points, resolved from real dist-info folders in child processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from shipped import child, ship

from ciphertune.errors import SelectionError
from ciphertune.plugins import registry


def test_plugins_load_lazily_and_a_broken_one_disables_nothing(tmp_path: Path) -> None:
    ship(
        tmp_path,
        "good",
        """
        [ciphertune.backends]
        good = good_plugin:GoodBackend
        [ciphertune.plugins]
        greeter = good_hooks
        """,
        good_plugin="""
        from ciphertune import get_backend
        class GoodBackend(get_backend("clear")): name = "good"
        """,
        good_hooks="""
        import ciphertune
        @ciphertune.hookspecs.hookimpl
        def ciphertune_session_opened(session): pass
        """,
    )
    ship(
        tmp_path,
        "bad",
        """
        [ciphertune.backends]
        absent = bad_plugin:Nothing
        broken = bad_plugin:BadBackend
        missing = no_such_module:Backend
        [ciphertune.plugins]
        misspelt = bad_hooks
        unimportable = bad_plugin
        """,
        bad_plugin="raise RuntimeError('needs a newer driver')",
        bad_hooks="""
        import ciphertune
        @ciphertune.hookspecs.hookimpl
        def ciphertune_session_openned(session): pass
        """,
    )
    child(
        """
        import sys, warnings
        import ciphertune
        from ciphertune.plugins import registry
        from ciphertune.errors import PluginError, SelectionError

        def plugins():
            prefixes = ("torch", "numpy", "click", "rich", "peft", "transformers", "ciphertune_", "good_", "bad_")
            return sorted(name for name in sys.modules if name.startswith(prefixes))

        assert ciphertune.__version__ and plugins() == [], plugins()
        backends = registry.installed(registry.BACKENDS)
        assert {"good", "broken", "absent", "missing", "clear", "mlwe"} <= backends.keys()
        assert backends["good"].distribution == "good 1.0", backends["good"]
        assert backends["good"].target == "good_plugin:GoodBackend"
        assert list(backends) == sorted(backends)
        assert plugins() == [], plugins()

        for name, cause in [
            ("broken", "RuntimeError: needs a newer driver"),
            ("missing", "the package 'no_such_module' is not installed"),
        ]:
            try:
                registry.load(registry.BACKENDS, name)
            except PluginError as error:
                text = str(error)
                assert repr(name) in text and "bad 1.0" in text and cause in text, text
                assert error.__cause__ is not None
            else:
                raise AssertionError(name)
        assert registry.load(registry.BACKENDS, "good").name == "good"
        assert [name for name in plugins() if name.startswith(("good_", "bad_"))] == ["good_plugin"], plugins()
        assert registry.load(registry.BACKENDS, "clear").name == "clear"

        try:
            registry.load(registry.BACKENDS, "goot")
        except SelectionError as error:
            assert "did you mean 'good'?" in str(error) and "mlwe" in str(error), error
        else:
            raise AssertionError

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            from ciphertune.plugins.manager import plugin_manager

            manager = plugin_manager()
        assert sorted(manager.failed) == ["misspelt", "unimportable"], manager.failed
        assert "needs a newer driver" in manager.failed["unimportable"]
        assert "ciphertune_session_openned" in manager.failed["misspelt"]
        messages = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
        assert len(messages) == 2 and any("unimportable" in m for m in messages), messages
        assert {"greeter", "progress"} <= set(manager.names()), manager.names()
        assert "misspelt" not in manager.names()
        """,
        tmp_path,
        torch=False,
    )


def test_choosing_one_backend_loads_no_other(tmp_path: Path) -> None:
    printed = child(
        """
        import sys
        from ciphertune.client.choice import choose
        choose("clear")
        print(*sorted(name for name in sys.modules if name.startswith("ciphertune_")))
        """,
        tmp_path,
    )
    assert printed.split() == ["ciphertune_clear", "ciphertune_local"]


DUPLICATES = """
from ciphertune.plugins import registry
from ciphertune.errors import PluginError
row = registry.installed(registry.BACKENDS)["twin"]
try:
    row.load()
except PluginError as error:
    print(row.target, error)
print(registry.get_backend("clear").name, len(registry.displaced(registry.BACKENDS)))
"""


def test_a_name_taken_twice_is_an_error_for_whoever_asks_for_it(tmp_path: Path) -> None:
    ship(tmp_path, "one", "[ciphertune.backends]\ntwin = one_plugin:A\n")
    ship(tmp_path, "two", "[ciphertune.backends]\ntwin = two_plugin:B\n")
    text = child(DUPLICATES, tmp_path)
    assert "'twin' is registered 2 times in ciphertune.backends" in text
    assert text.splitlines()[-1] == "clear 1", "the other names are as they were"
    assert "one 1.0 (one_plugin:A)" in text
    assert "two 1.0 (two_plugin:B)" in text


def test_the_same_target_seen_twice_is_one_plugin(tmp_path: Path) -> None:
    # An editable install beside a built one shows up like this.
    ship(tmp_path, "one", "[ciphertune.backends]\ntwin = one_plugin:A\n")
    ship(tmp_path, "two", "[ciphertune.backends]\ntwin = one_plugin:A\n")
    text = child(DUPLICATES, tmp_path)
    assert "the package 'one_plugin' is not installed" in text
    assert text.splitlines()[-1] == "clear 0"


def test_builtin_plugins_are_registered_as_a_third_partys() -> None:
    backends = registry.installed(registry.BACKENDS)
    transports = registry.installed(registry.TRANSPORTS)
    assert {"clear", "mlwe", "simulation"} <= backends.keys()
    assert "local" in transports
    for group, rows in ((registry.BACKENDS, backends), (registry.TRANSPORTS, transports)):
        for name, row in rows.items():
            assert row.target.partition(":")[0].startswith("ciphertune_")
            assert registry.load(group, name).name == name


def test_transport_names_are_not_backend_names() -> None:
    with pytest.raises(SelectionError, match="unknown backend 'local'"):
        registry.load(registry.BACKENDS, "local")
