"""What is public, and the shortest journey through it."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

import ciphertune
from ciphertune import errors, hookspecs

PUBLIC = [
    "__version__",
    "CheckpointError",
    "CipherTuneError",
    "ConfigError",
    "InputError",
    "KeyFileError",
    "LayerError",
    "LoraTrainer",
    "OutsourcedLinear",
    "PluginError",
    "PrecisionError",
    "SecurityError",
    "SelectionError",
    "Session",
    "Traffic",
    "TrainingError",
    "TransportError",
    "WorkerError",
    "calibrate",
    "get_backend",
    "get_transport",
    "in_the_clear",
    "interleave",
    "load_client",
    "load_concrete_ml",
    "outsource",
    "outsourced_layers",
    "public_batches",
    "restore",
    "session_of",
    "share",
    "split",
    "validate",
]
FRONT = {
    "backend": [
        "Backend",
        "Buffers",
        "ClientHalf",
        "Direction",
        "Encrypted",
        "FLOAT32_ROUNDING",
        "INTERFACE_VERSION",
        "Joint",
        "LinearMap",
        "NoiseModel",
        "Preparation",
        "SecurityStatement",
        "WORST_RELATIVE_ERROR",
        "WeightBits",
        "Work",
        "WorkerHalf",
        "columns_of",
        "in_order",
    ],
    "callers": ["Owners", "batch_of", "has_several", "owners_of"],
    "cache": [
        "Entry",
        "Hold",
        "IN_USE",
        "cache_folder",
        "entries",
        "free_bytes",
        "make_room",
        "remove",
    ],
    "key_files": [
        "hide_process",
        "keys_folder",
        "make_keys_folder",
        "read_key_file",
        "refuse_shared",
        "write_key_file",
        "write_parts",
    ],
    "linear": [
        "Evaluator",
        "OutsourcedLinear",
    ],
    "protocol": [
        "DEFAULT_LIMITS",
        "ERROR_CODES",
        "Frame",
        "HELLO_VERSION",
        "KINDS",
        "Limits",
        "Message",
        "OLDEST_VERSION",
        "VERSION",
        "agree",
        "buffers_fault",
        "error_message",
        "pack",
        "spoken_versions",
        "unpack",
    ],
    "selection": [
        "Selection",
        "SessionOptions",
        "Timeouts",
        "parse_use",
    ],
    "status": [
        "ClientUsage",
        "WorkerStatus",
    ],
    "tracker": [
        "Tracker",
    ],
    "traffic": [
        "COSTS",
        "Exchange",
        "SUMS",
        "SetUp",
        "Traffic",
        "TrafficByLayer",
        "add_to",
        "by_kind",
        "kind_of",
        "total",
        "zero",
    ],
    "transport": [
        "CHAIN",
        "Connections",
        "GRACE_SECONDS",
        "INTERFACE_VERSION",
        "Link",
        "Listener",
        "LocalWorker",
        "Loopback",
        "MOST_STRANGERS",
        "PendingReplies",
        "Reply",
        "RequestHandler",
        "Transport",
        "WrappingTransport",
        "connections_allowed",
        "opening_links",
    ],
    "weights": [
        "CodeNorms",
        "CodeSource",
        "DIGEST_ROWS",
        "KeptChannels",
        "LARGEST_READING",
        "LayerInfo",
        "LayerWeight",
        "MOST_CHANNELS",
        "Shard",
        "code_dtype",
        "describe",
        "group_map",
        "holdings_digest",
        "lookup_map",
        "model_digest",
        "quantize",
        "quantize_layer",
        "read_manifest",
        "row_digests",
    ],
}
"""Public names of the front modules but ``errors`` and ``hookspecs``, which have tests of their own."""
HOOKS = {
    "ciphertune_select_layers": ["model", "candidates"],
    "ciphertune_session_opened": ["session"],
    "ciphertune_preparing": ["session", "done", "total"],
    "ciphertune_worker_excluded": ["session", "worker", "layers", "direction"],
    "ciphertune_worker_silent": ["session", "worker", "problem", "seconds"],
    "ciphertune_worker_back": ["session", "worker", "seconds"],
    "ciphertune_sending_key": ["worker", "nbytes", "done"],
    "ciphertune_session_closed": ["session"],
    "ciphertune_before_request": ["session", "exchange"],
    "ciphertune_after_reply": ["session", "exchange"],
    "ciphertune_training_start": ["trainer", "total_steps", "start_step"],
    "ciphertune_training_step": ["trainer", "step", "metrics"],
    "ciphertune_evaluation": ["trainer", "step", "metrics"],
    "ciphertune_training_end": ["trainer", "step", "reason"],
    "ciphertune_register_commands": ["cli"],
}


def test_public_names() -> None:
    assert ciphertune.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(ciphertune))
    for name in PUBLIC:
        value = getattr(ciphertune, name)
        assert value is not None
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__name__ == name
            assert value.__doc__


def test_front_modules_have_these_names() -> None:
    folder = Path(ciphertune.__file__).parent
    found = {}
    for file in folder.glob("[a-z]*.py"):
        body = ast.parse(file.read_text(encoding="utf-8")).body
        names = {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        targets = [node.targets[0] for node in body if isinstance(node, ast.Assign)]
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
        found[file.stem] = sorted(n for n in names if not n.startswith("_") and n != "log" and not n.endswith("T"))
    assert {name: names for name, names in found.items() if name not in ("errors", "hookspecs")} == FRONT


def test_public_names_are_exported_to_type_checkers_too() -> None:
    """The lazy table and the imports that a type checker reads are the same list."""
    tree = ast.parse(Path(ciphertune.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        (alias.asname, node.module) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == {(name, f"ciphertune.{module}") for name, module in ciphertune._HOMES.items()}


def test_names_that_are_not_public() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'outsorce'"):
        ciphertune.outsorce  # noqa: B018


def test_signatures() -> None:
    parameters = inspect.signature(ciphertune.outsource).parameters
    assert [(p.name, p.default) for p in parameters.values()] == [
        ("model", inspect.Parameter.empty),
        ("to", "mlwe"),
        ("layers", None),
        ("embeddings", False),
        ("convolutions", False),
        ("calibration", None),
        ("plugins", None),
    ]
    assert parameters["plugins"].kind is inspect.Parameter.KEYWORD_ONLY


def test_hooks() -> None:
    found = {
        name: list(inspect.signature(function).parameters)
        for name, function in vars(hookspecs).items()
        if name.startswith("ciphertune_")
    }
    assert found == HOOKS
    assert all(getattr(hookspecs, name).__doc__ for name in HOOKS)


def documented_tree(text: str) -> dict[str, str]:
    """Child and parent of every class in a drawn tree."""
    parents: dict[str, str] = {}
    path: list[str] = []
    for line in text.splitlines():
        if "── " not in line and line != "CipherTuneError":
            continue
        drawing, _, rest = line.rpartition("── ")
        name = (rest or line).split()[0]
        depth = (len(drawing) + 3) // 4 if drawing else 0
        del path[depth:]
        if path:
            parents[name] = path[-1]
        path.append(name)
    return parents


def test_the_drawn_tree_of_errors_is_the_real_one() -> None:
    classes = [
        value
        for value in vars(errors).values()
        if inspect.isclass(value) and issubclass(value, Exception) and value.__module__ == errors.__name__
    ]
    real = {cls.__name__: cls.__bases__[0].__name__ for cls in classes if cls is not errors.CipherTuneError}
    assert len(real) == len(classes) - 1
    assert documented_tree(errors.__doc__ or "") == real
    assert all(cls.__doc__ for cls in classes)


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.SelectionError, ValueError),
        (errors.LayerError, ValueError),
        (errors.InputError, ValueError),
        (errors.PrecisionError, ValueError),
        (errors.TransportTimeoutError, TimeoutError),
        (errors.ConfigError, ValueError),
    ],
)
def test_errors_are_the_builtins_that_callers_expect(error: type[Exception], builtin: type[Exception]) -> None:
    assert issubclass(error, builtin)


def test_the_default_encrypts() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))
    x = torch.randn(8, 16)
    expected = model(x).detach()
    assert ciphertune.outsource(model) is model
    session = ciphertune.session_of(model)
    assert session.security.encrypted
    assert (session.security.bits or 0) >= 128
    torch.testing.assert_close(model(x).detach(), expected, rtol=0.05, atol=0.05)


def test_a_loop_of_ones_own_is_the_loop_without_outsourcing() -> None:
    curves = []
    for outsourced in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 2))
        model[0].requires_grad_(False)
        model[2].weight.requires_grad_(False)
        if outsourced:
            ciphertune.outsource(model, "clear")
            assert [layer.name for layer in ciphertune.outsourced_layers(model)] == ["0", "2"]
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
        x, target = torch.randn(32, 6), torch.randint(0, 2, (32,))
        curve = []
        for _ in range(40):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(curve)
    assert curves[0][-1] < 0.9 * curves[0][0]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
