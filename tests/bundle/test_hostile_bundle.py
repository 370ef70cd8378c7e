"""Whoever makes a bundle chooses every byte of the client's part: each field out of range is refused by its name."""

from __future__ import annotations

import copy
import json
import math
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import ciphertune
from ciphertune.bundle.client import check_client
from ciphertune.bundle.manifest import check_model_config, read_client, sizes_of
from ciphertune.bundle.worker import load_worker
from ciphertune.errors import ConfigError
from ciphertune.models.load import load_tokenizer
from ciphertune.worker import Worker

ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 80), 0),
    st.integers(1 << 31, 1 << 80),
    st.sampled_from([math.nan, math.inf, -math.inf, -1e-3, 1e300, 3.5]),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from(["\x1b[2J", "x" * 600, "name\n"]),
)
FIELDS = [
    ("weight_bits",),
    ("model",),
    ("dtype",),
    ("layers",),
    ("groups",),
    ("groups", 0),
    ("groups", 0, 0),
    *(("layers", 1, key) for key in ("name", "in_features", "out_features", "max_row_norm", "max_column_norm")),
]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 70))


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("split")
    ciphertune.split(model(), folder, layers="all", weight_bits=8)
    return folder


@pytest.fixture
def bundle(split: Path, tmp_path: Path) -> Path:
    import shutil

    shutil.copytree(split, tmp_path / "bundle")
    return tmp_path / "bundle"


def load(bundle: Path) -> nn.Module:
    loaded: nn.Module = ciphertune.load_client(
        bundle / "client",
        "clear?weight_bits=8",
        skeleton=model().to("meta"),
        worker=Worker(load_worker(bundle / "worker")),
    )
    return loaded


def altered(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    found = copy.deepcopy(content)
    place = found
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return found


@pytest.mark.parametrize("path", FIELDS, ids=lambda path: ".".join(map(str, path)))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=ANYTHING)
def test_a_field_that_is_none_is_named(split: Path, path: tuple[Any, ...], value: Any) -> None:
    content = json.loads((split / "client" / "ciphertune.json").read_text())
    assert read_client(split, content).layers[1].out_features == 70
    own = content
    for key in path:
        own = own[key]
    if (
        value == own
        or (path[-1] == "model" and value == "")
        or (path[0] == "groups" and value in (0, [0], [1], [0, 1]))
    ):
        return
    if path[-1] in ("max_row_norm", "max_column_norm") and value in (0, 3.5) and type(value) is not bool:
        return  # in range: held against the codes when these are read
    name = next(str(key) for key in reversed(path) if isinstance(key, str))
    with pytest.raises(ConfigError, match=rf"ciphertune\.json is damaged: .*{name}"):
        read_client(split, altered(content, path, value))


@pytest.mark.parametrize("path", [path for path in FIELDS if isinstance(path[-1], str)], ids=lambda p: str(p[-1]))
def test_a_field_that_is_missing_is_named(split: Path, path: tuple[Any, ...]) -> None:
    content = json.loads((split / "client" / "ciphertune.json").read_text())
    place = content
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    with pytest.raises(ConfigError, match=str(path[-1])):
        read_client(split, content)


def test_layers_named_twice_and_groups_of_other_inputs(split: Path) -> None:
    content = json.loads((split / "client" / "ciphertune.json").read_text())
    with pytest.raises(ConfigError, match="layers: expected each layer once, got '0'"):
        read_client(split, altered(content, ("layers", 1, "name"), "0"))
    other = altered(altered(content, ("layers", 1, "in_features"), 25), ("groups",), [[0, 1]])
    with pytest.raises(ConfigError, match=r"groups\[0\]: expected layers of equal in_features"):
        read_client(split, other)
    with pytest.raises(ConfigError, match="groups: expected each layer in one group"):
        read_client(split, altered(content, ("groups",), [[0], [0]]))


CHANGES: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    r"1\.scale": lambda t: t.update({"1.scale": t["1.scale"].clone().fill_(math.nan)}),
    r"1\.scale holds": lambda t: t.update({"1.scale": -t["1.scale"]}),
    r"1\.scale is": lambda t: t.update({"1.scale": t["1.scale"].double()}),
    r"1\.scale does": lambda t: t.update({"1.scale": torch.ones(1 << 20)}),
    r"0\.digests does": lambda t: t.update({"0.digests": torch.ones(3, dtype=torch.uint8)}),
    r"0\.digests is": lambda t: t.update({"0.digests": torch.ones(32)}),
    r"no tensor '0\.digests'": lambda t: t.pop("0.digests"),
}


@pytest.mark.parametrize("named", CHANGES)
def test_scales_and_hashes(bundle: Path, named: str) -> None:
    file = bundle / "client" / "outsourced.safetensors"
    tensors = load_file(file)
    CHANGES[named](tensors)
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=named):
        load(bundle)


def test_a_norm_of_another_weight_is_found_when_the_codes_are_read(bundle: Path) -> None:
    file = bundle / "client" / "ciphertune.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(altered(content, ("layers", 1, "max_row_norm"), 3.5)))
    with pytest.raises(ciphertune.errors.WeightsError, match="1: the norms that are noted"):
        ciphertune.load_client(
            bundle / "client",
            "mlwe?hint_disk=0",
            skeleton=model().to("meta"),
            worker=Worker(load_worker(bundle / "worker")),
            weights=bundle / "worker",
        )


@pytest.mark.skipif(os.name != "posix", reason="links and pipes")
def test_links_out_of_the_folder_and_pipes(bundle: Path) -> None:
    secret = bundle.parent / "secret"
    secret.write_text("secret")
    client = bundle / "client"
    (client / "inner.txt").symlink_to("ciphertune.json")
    load(bundle)
    for name, make in (
        ("link", lambda path: path.symlink_to(secret)),
        ("folder", lambda path: path.symlink_to(bundle.parent)),
        ("broken", lambda path: path.symlink_to(bundle.parent / "none")),
        ("pipe", os.mkfifo),
    ):
        make(client / name)
        with pytest.raises(ConfigError, match=f"{name} is (a link that leads out|no plain file)"):
            load(bundle)
        (client / name).unlink()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("num_hidden_layers",), 10**6),
        (("num_hidden_layers",), 11),
        (("vocab_size",), 1 << 40),
        (("vocab_size",), 1 << 30),
        (("num_labels",), 1 << 30),
        (("text_config", "hidden_size"), -(1 << 40)),
        (("text_config", "num_experts"), 1 << 28),
        (("text_config", "attention_types"), [[["global"], 1 << 30]]),
        (("rope_theta",), math.nan),
        (("sizes", 1), 1 << 70),
        (("max_position_embeddings",), 1 << 31),
    ],
)
def test_numbers_of_a_configuration_are_looked_at_before_anything_is_built(
    tmp_path: Path, path: tuple[Any, ...], value: Any
) -> None:
    content = {"num_hidden_layers": 2, "text_config": {}, "sizes": [1, 2], "max_position_embeddings": 10_485_760}
    sizes = sizes_of([(300_000, 8), *[(8, 8)] * 9])
    check_model_config(tmp_path, sizes)
    (tmp_path / "config.json").write_text(json.dumps(content | {"vocab_size": 300_000, "rope_theta": 100_000_000}))
    check_model_config(tmp_path, sizes)
    (tmp_path / "config.json").write_text(json.dumps(altered(content, path, value)))
    with pytest.raises(ConfigError, match=str(next(key for key in reversed(path) if isinstance(key, str)))):
        check_model_config(tmp_path, sizes)


def test_tables_that_python_computes_are_no_larger_than_the_model(tmp_path: Path) -> None:
    content = {"model_type": "distilbert", "dim": 8, "max_position_embeddings": 512}
    (tmp_path / "config.json").write_text(json.dumps(content))
    check_model_config(tmp_path, sizes_of([(512, 8)]))
    (tmp_path / "config.json").write_text(json.dumps(content | {"max_position_embeddings": 1 << 20}))
    with pytest.raises(ConfigError, match="max_position_embeddings: expected a table of positions"):
        check_model_config(tmp_path, sizes_of([(512, 8)]))


def test_settings_are_no_large_files(ciphertune_bundle: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(ciphertune_bundle / "client", tmp_path / "client")
    check_client(tmp_path / "client")
    for name, said in (
        ("tokenizer_config.json", "holds settings"),
        ("config.json", "settings|size"),
        ("preprocessor_config.json", "holds settings"),
        ("additional_chat_templates/tool.jinja", "holds settings"),
        ("tokenizer.json", "holds a vocabulary"),
        ("vocab.txt", "holds a vocabulary"),
        ("merges.txt", "holds a vocabulary"),
        ("spiece.model", "holds a vocabulary"),
        ("model.safetensors.index.json", "too large to be a table"),
    ):
        shutil.copytree(ciphertune_bundle / "client", tmp_path / name)
        (tmp_path / name / name).parent.mkdir(exist_ok=True)
        with (tmp_path / name / name).open("r+b" if (tmp_path / name / name).exists() else "wb") as file:
            file.truncate(1 << 29)  # takes no room on the disk
        with pytest.raises(ConfigError, match=said):
            check_client(tmp_path / name)


def _replaced(count: int) -> dict[str, Any]:
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    return {"type": "Sequence", "normalizers": [step] * count}


TOKENIZERS: list[tuple[dict[str, Any], str]] = [
    ({"normalizer": _replaced(40)}, "normalizer: expected a text at most 64 times as long"),
    ({"normalizer": {"type": "Prepend", "prepend": "x" * 1000}}, "normalizer"),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits"}] * 300}}, "pre_tokenizer"),
    ({"post_processor": {"single": [{"SpecialToken": {"id": "a", "type_id": 0}}] * 300}}, "post_processor"),
    ({"decoder": json.loads("[" * 100 + "1" + "]" * 100)}, "decoder: expected values at most 64 deep"),
    ({"padding": {"strategy": {"Fixed": 1 << 40}}}, "padding.Fixed"),
    ({"padding": {"pad_to_multiple_of": 1 << 40}}, "padding.pad_to_multiple_of"),
    ({"truncation": {"max_length": -1}}, "truncation.max_length"),
]


@pytest.mark.parametrize(("changes", "said"), TOKENIZERS, ids=lambda each: str(each)[:30])
def test_a_tokenizer_that_makes_much_of_little_is_refused(
    ciphertune_bundle: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    import shutil

    shutil.copytree(ciphertune_bundle / "client", tmp_path / "client")
    tiny.save_letters(tmp_path / "client")
    check_client(tmp_path / "client")
    assert len(load_tokenizer(str(tmp_path / "client"))) == 97
    file = tmp_path / "client" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    for load_it in (lambda: check_client(tmp_path / "client"), lambda: load_tokenizer(str(tmp_path / "client"))):
        with pytest.raises(ConfigError, match=f"tokenizer.json is damaged: {said}"):
            load_it()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"added_tokens": [' + "[]," * (1 << 23) + "[]]}", "at most 8388608 values"),
        ("[" * (1 << 20), "it is not JSON"),
        ("[1", "it is not JSON"),
        ("[]", "expected an object"),
    ],
    ids=["many values", "deep", "cut off", "a list"],
)
def test_tables_are_counted_before_they_are_read(
    ciphertune_bundle: Path, tmp_path: Path, content: str, said: str
) -> None:
    import shutil

    shutil.copytree(ciphertune_bundle / "client", tmp_path / "client")
    (tmp_path / "client" / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=said):
        check_client(tmp_path / "client")


HARMLESS = ("max_position_embeddings", "architectures")  # numbers that this model makes nothing of
HOSTILE: list[tuple[str, Any]] = [
    ("vocab_size", 1 << 31),
    ("vocab_size", 200_000),
    ("hidden_size", 1 << 18),
    ("intermediate_size", 1 << 30),
    ("num_hidden_layers", 1 << 20),
    ("num_attention_heads", 1 << 25),
    ("num_key_value_heads", 0),
    ("head_dim", 1 << 18),
    ("max_position_embeddings", -1),
    ("rope_theta", math.nan),
    ("rope_parameters", {"rope_type": "default", "rope_theta": "x"}),
    ("num_labels", 1 << 30),
    ("torch_dtype", "float1"),
    ("architectures", ["Ghost"]),
    ("layer_types", ["full_attention"] * (1 << 20)),
]


@pytest.mark.parametrize(("key", "value"), HOSTILE, ids=[f"{key}-{str(value)[:20]}" for key, value in HOSTILE])
def test_a_hostile_configuration_is_refused_without_memory(
    ciphertune_bundle: Path, tmp_path: Path, key: str, value: Any
) -> None:
    """What cannot be the model of these tensors ends in an error of ours; what changes nothing ends in the model."""
    import shutil

    shutil.copytree(ciphertune_bundle, tmp_path / "bundle")
    client = tmp_path / "bundle" / "client"
    content = json.loads((client / "config.json").read_text())
    (client / "config.json").write_text(json.dumps(content | {key: value}))
    worker = Worker(load_worker(tmp_path / "bundle" / "worker"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if key in HARMLESS:
        ciphertune.session_of(ciphertune.load_client(client, "clear?weight_bits=8", worker=worker)).close()
    else:
        with pytest.raises(ConfigError):
            ciphertune.load_client(client, "clear?weight_bits=8", worker=worker)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 18  # KiB


def test_code_that_comes_with_a_model_is_not_run(ciphertune_bundle: Path, tmp_path: Path) -> None:
    """Not even asked about, where standard input is a terminal."""
    import shutil

    shutil.copytree(ciphertune_bundle, tmp_path / "bundle")
    client = tmp_path / "bundle" / "client"
    content = json.loads((client / "config.json").read_text())
    content |= {"model_type": "other", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (client / "config.json").write_text(json.dumps(content))
    (client / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    with pytest.raises(ConfigError, match="config"):
        ciphertune.load_client(
            client, "clear?weight_bits=8", worker=Worker(load_worker(tmp_path / "bundle" / "worker"))
        )
    assert not (tmp_path / "ran").exists()
