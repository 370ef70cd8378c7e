"""Splitting a model and building the client's part again."""

from __future__ import annotations

import copy
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import remote
import tiny as models
import torch
import warm
from safetensors.torch import load_file, save_file
from torch import nn

import ciphertune
from ciphertune.bundle.placement import Placement
from ciphertune.bundle.worker import load_worker
from ciphertune.bundle.writer import SplitResult
from ciphertune.client.placement import place
from ciphertune.errors import ConfigError, OutsourcedWeightError, UnknownLayerError, UnsupportedLayerError
from ciphertune.weights import DIGEST_ROWS, read_manifest
from ciphertune.worker import Worker

Tiny = Callable[[str], nn.Module]
CLEAR = "clear?weight_bits=8"
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def client(bundle: SplitResult | Path, to: str = CLEAR, **options: Any) -> Any:
    folder = bundle if isinstance(bundle, Path) else bundle.client.parent
    return ciphertune.load_client(folder / "client", to, worker=Worker(load_worker(folder / "worker")), **options)


def output(model: Any) -> torch.Tensor:
    ids = torch.randint(48, (2, 10), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids).logits
    return logits


@pytest.fixture
def saved(tiny: Tiny, tmp_path: Path) -> Callable[..., Path]:
    """A tiny model as a folder of safetensors."""

    def save(name: str, **options: Any) -> Path:
        tiny(name).save_pretrained(tmp_path / name, **options)  # type: ignore[operator]
        return tmp_path / name

    return save


@pytest.mark.parametrize("layers", [None, "all"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "bert"])
def test_a_split_model_computes_what_an_outsourced_one_does(
    tiny: Tiny, saved: Any, tmp_path: Path, name: str, layers: Any
) -> None:
    expected = output(ciphertune.outsource(tiny(name), CLEAR, layers))
    streamed = ciphertune.split(str(saved(name)), tmp_path / "streamed", layers=layers)
    model = client(streamed)
    assert torch.equal(output(model), expected)
    assert type(model) is type(tiny(name))
    assert not model.training
    in_memory = ciphertune.split(tiny(name), tmp_path / "memory", layers=layers)
    assert torch.equal(output(client(in_memory)), expected)
    assert (streamed.outsourced, streamed.layers) == (in_memory.outsourced, in_memory.layers)
    for file in (tmp_path / "streamed" / "worker" / "layers").iterdir():
        assert file.read_bytes() == (tmp_path / "memory" / "worker" / "layers" / file.name).read_bytes()
    kept = sum(p.numel() for p in model.parameters())
    assert streamed.at_client in (kept, kept + sum(b.numel() for b in model.buffers()))


def test_tied_weights_stay_tied_unless_the_head_is_outsourced(saved: Any, tmp_path: Path) -> None:
    folder = str(saved("llama-tied"))
    tied = client(ciphertune.split(folder, tmp_path / "tied"))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert tied.config.tie_word_embeddings
    free = client(ciphertune.split(folder, tmp_path / "free", layers="all"))
    assert isinstance(free.lm_head, ciphertune.OutsourcedLinear)
    free.tie_weights()
    assert isinstance(free.lm_head, ciphertune.OutsourcedLinear)
    assert "lm_head.weight" not in free.state_dict()
    assert free.model.embed_tokens.weight.shape == (48, 16)


def test_sharded_checkpoints_and_ones_without_the_base_prefix(tiny: Tiny, saved: Any, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    sharded = saved("llama", max_shard_size="4KB")
    assert (sharded / "model.safetensors.index.json").exists()
    expected = output(ciphertune.outsource(tiny("llama"), CLEAR))
    assert torch.equal(output(client(ciphertune.split(str(sharded), tmp_path / "a"))), expected)
    # A checkpoint of the bare model, without 'model.' before its names and without a head of its own.
    tiny("llama-tied").model.save_pretrained(tmp_path / "bare")
    config = json.loads((tmp_path / "bare" / "config.json").read_text())
    (tmp_path / "bare" / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    model = client(ciphertune.split(tmp_path / "bare", tmp_path / "b"))
    assert isinstance(model, LlamaForCausalLM)
    assert torch.equal(output(model), output(ciphertune.outsource(tiny("llama-tied"), CLEAR)))


def test_what_cannot_be_streamed_is_split_in_memory(tiny: Tiny, saved: Any, tmp_path: Path) -> None:
    folder = saved("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["somewhere.else"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 tensors .*model.layers.1.mlp.up_proj.weight.*--in-memory"):
        ciphertune.split(str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    whole = saved("gpt2")
    split = ciphertune.split(str(whole), tmp_path / "in-memory", in_memory=True)
    assert torch.equal(output(client(split)), output(ciphertune.outsource(tiny("gpt2"), CLEAR)))


@pytest.mark.parametrize("by", ["layers", "rows"])
def test_shards_hold_every_row_once(tmp_path: Path, by: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 300), nn.Linear(300, 20), nn.Linear(20, 130))
    result = ciphertune.split(model, tmp_path / "bundle", workers=3, placement=by)
    stores = [load_worker(folder) for folder in result.workers]
    holdings = {i: read_manifest(store.manifest()) for i, store in enumerate(stores)}
    shards = [shard for blocks in holdings.values() for block in blocks for shard in block]
    rows = {name: sorted((s.start, s.stop) for s in shards if s.name == name) for name in "012"}
    for name, width in (("0", 300), ("1", 20), ("2", 130)):
        assert rows[name][0][0] == 0
        assert rows[name][-1][1] == width
        assert all(before[1] == after[0] for before, after in zip(rows[name], rows[name][1:], strict=False))
        assert all(start % DIGEST_ROWS == 0 for start, _ in rows[name])
    assert (len(rows["0"]) == 3) == (by == "rows")
    assert sum(result.worker_bytes) == result.outsourced == sum(store.nbytes for store in stores)
    infos = [layer.info for layer in ciphertune.outsourced_layers(ciphertune.outsource(model, "mlwe"))]
    place([[info] for info in infos], holdings, {i: str(i) for i in holdings})


def test_replicas_share_the_disk(tmp_path: Path) -> None:
    result = ciphertune.split(nn.Sequential(nn.Linear(8, 4)), tmp_path / "bundle", workers=3, placement="replicas")
    assert [folder.name for folder in result.workers] == ["worker-0", "worker-1", "worker-2"]
    files = [folder / "layers" / "00000.safetensors" for folder in result.workers]
    assert len({file.stat().st_ino for file in files}) == 1
    assert len({tuple(load_worker(folder)) for folder in result.workers}) == 1


def test_modules_that_are_not_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).eval(), torch.randn(5, 8)
    result = ciphertune.split(model, tmp_path / "bundle")
    expected = ciphertune.outsource(copy.deepcopy(model), CLEAR)(x)
    with pytest.raises(ConfigError, match="skeleton="):
        client(result)
    with torch.device("meta"):
        skeleton = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).eval()
    assert torch.equal(client(result, skeleton=skeleton)(x), expected)


@pytest.mark.slow
def test_an_adapter_from_the_client_loads_on_the_original_model(tiny: Tiny, saved: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    result = ciphertune.split(str(saved("llama")), tmp_path / "bundle")
    model = remote.with_adapter(client(result, "mlwe"))
    trainer = ciphertune.LoraTrainer(model, learning_rate=5e-2, epochs=10)
    trainer.train(remote.batches(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.save_adapter(tmp_path / "adapter")
    for file in (tmp_path / "adapter").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file
    stated = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert stated["base_model_name_or_path"] == "llama"
    tuned = PeftModel.from_pretrained(tiny("llama"), tmp_path / "adapter")
    trained = {n: p for n, p in model.named_parameters() if "lora" in n}
    loaded = {n: p for n, p in tuned.named_parameters() if "lora" in n}
    assert trained.keys() == loaded.keys()
    assert all(torch.equal(trained[n], loaded[n]) for n in trained)
    data = remote.batches(2)
    with torch.no_grad():
        split, whole, before = (
            sum(float(m(**batch).loss) for batch in data) / 2 for m in (model.eval(), tuned.eval(), tiny("llama"))
        )
    # The workers' weights have 8 bits; training moved the loss by much more than that does.
    assert abs(split - whole) < 0.05 * abs(before - whole)


def test_the_dtype_is_the_stored_one_unless_another_is_asked_for(tiny: Tiny, tmp_path: Path) -> None:
    model: Any = tiny("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    result = ciphertune.split(str(tmp_path / "half"), tmp_path / "bundle")
    stored, single = client(result), client(result, dtype=torch.float32)
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in single.parameters()} == {torch.float32}
    assert stored.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert stored.model.rotary_emb.inv_freq.dtype == single.model.rotary_emb.inv_freq.dtype == torch.float32
    assert output(stored).dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [8, 16])
def test_the_bundles_bits_must_be_the_backends(tmp_path: Path, bits: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    result = ciphertune.split(model, tmp_path / "bundle", weight_bits=bits)
    with torch.device("meta"):
        skeleton = nn.Sequential(nn.Linear(8, 4))
    client(result, f"mlwe?weight_bits={bits}", skeleton=skeleton)
    for other in (f"mlwe?weight_bits={24 - bits}", "clear"):
        with pytest.raises(ConfigError, match=f"add weight_bits={bits} to it"):
            client(result, other, skeleton=skeleton)


def test_workers_are_needed(tmp_path: Path) -> None:
    result = ciphertune.split(nn.Sequential(nn.Linear(8, 4)), tmp_path / "bundle")
    with pytest.raises(ConfigError, match=r"name workers, for example 'mlwe\+zmq://HOST:5555'"):
        ciphertune.load_client(result.client, "mlwe")


def test_a_client_holds_no_outsourced_weight_to_give_back(saved: Any, tmp_path: Path) -> None:
    model = client(ciphertune.split(str(saved("llama")), tmp_path / "bundle"))
    with pytest.raises(OutsourcedWeightError, match="at the workers"):
        model.save_pretrained(tmp_path / "whole")
    assert sum(p.numel() for p in model.parameters()) == ciphertune.share(model).at_client


def test_serving_some_of_the_layers(saved: Any, tmp_path: Path) -> None:
    worker = ciphertune.split(str(saved("llama")), tmp_path / "bundle").workers[0]
    names = set(load_worker(worker))
    assert len(names) == 14
    assert set(load_worker(worker, layers=["model.layers.0.*"])) == {n for n in names if ".layers.0." in n}
    some = load_worker(worker, layers=["q_proj", "v_proj"])
    assert set(some) == {n for n in names if n.endswith(("q_proj", "v_proj"))}
    assert torch.equal(some["model.layers.1.self_attn.v_proj"], load_worker(worker)["model.layers.1.self_attn.v_proj"])
    with pytest.raises(UnknownLayerError, match="'nothing'"):
        load_worker(worker, layers=["nothing"])


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    model, out = nn.Sequential(nn.Linear(8, 4)), tmp_path / "bundle"
    ciphertune.split(model, out)
    (out / "note").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        ciphertune.split(model, out)
    assert (out / "note").exists()
    ciphertune.split(model, out, force=True)
    assert not (out / "note").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


def test_nothing_remains_of_a_split_that_fails(tiny: Tiny, tmp_path: Path) -> None:
    model: Any = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(UnsupportedLayerError, match=r"model.layers.1.mlp.down_proj .*NaN"):
        ciphertune.split(model, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def _cut_file(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def _edit(file: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def _flip(file: Path) -> None:
    tensors = load_file(file)
    tensors["codes"][0, 0] += 1
    save_file(tensors, file)


WORKER_DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "not a bundle's folder"),
    "not JSON": (lambda f: (f / "manifest.json").write_text("{"), "not JSON"),
    "another format": (lambda f: _edit(f / "manifest.json", lambda c: c.update(format="x-9")), "format 'x-9'"),
    "no blocks": (lambda f: _edit(f / "manifest.json", lambda c: c.pop("blocks")), "lists no blocks"),
    "a path outside": (
        lambda f: _edit(f / "manifest.json", lambda c: c["blocks"][0].update(file="../client/x")),
        "outside it",
    ),
    "sizes that lie": (
        lambda f: _edit(f / "manifest.json", lambda c: c["blocks"][0]["shards"][0].update(stop=3, out_features=3)),
        "damaged",
    ),
    "a file missing": (lambda f: (f / "layers" / "00000.safetensors").unlink(), "is missing"),
    "a file cut short": (lambda f: _cut_file(f / "layers" / "00000.safetensors"), "damaged"),
    "a weight changed": (lambda f: _flip(f / "layers" / "00000.safetensors"), "do not have the hash"),
}


@pytest.mark.parametrize("damage", WORKER_DAMAGE)
def test_damaged_worker_folders(tmp_path: Path, damage: str) -> None:
    folder = ciphertune.split(nn.Sequential(nn.Linear(8, 4)), tmp_path / "bundle").workers[0]
    change, message = WORKER_DAMAGE[damage]
    change(folder)
    with pytest.raises(ConfigError, match=message):
        load_worker(folder)


CLIENT_DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda f: (f / "ciphertune.json").unlink(), "not a bundle's folder"),
    "another format": (lambda f: _edit(f / "ciphertune.json", lambda c: c.update(format="x-9")), "format 'x-9'"),
    "no layers": (
        lambda f: _edit(f / "ciphertune.json", lambda c: c.update(layers=[])),
        "layers: expected at least",
    ),
    "a group twice": (
        lambda f: _edit(f / "ciphertune.json", lambda c: c["groups"].append([0])),
        "layer in one group",
    ),
    "another size": (
        lambda f: _edit(f / "ciphertune.json", lambda c: c["layers"][0].update(out_features=99)),
        "does not fit the 99 rows",
    ),
    "another layer": (
        lambda f: _edit(f / "ciphertune.json", lambda c: c["layers"][0].update(in_features=15)),
        "layers of equal in_features",
    ),
    "no scales": (lambda f: (f / "outsourced.safetensors").unlink(), "is missing"),
    "weights cut short": (lambda f: _cut_file(f / "model-00001.safetensors"), "damaged"),
    "a tensor missing": (
        lambda f: _edit(f / "model.safetensors.index.json", lambda c: c["weight_map"].pop("model.norm.weight")),
        "lacks 1 tensors, 'model.norm.weight'",
    ),
}


@pytest.mark.parametrize("damage", CLIENT_DAMAGE)
def test_damaged_client_folders(saved: Any, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "bundle"
    ciphertune.split(str(saved("llama")), folder)
    change, message = CLIENT_DAMAGE[damage]
    change(folder / "client")
    with pytest.raises(ConfigError, match=message):
        client(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "1 or more"),
        ({"workers": 2, "placement": "layers:2,rows:2"}, "for 4 workers, not 2"),
        ({"workers": 2, "placement": "columns"}, "write layers, rows or replicas"),
        ({"weight_bits": 4}, "8 or 16"),
    ],
)
def test_arguments_of_split(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ciphertune.split(nn.Sequential(nn.Linear(8, 4)), tmp_path / "bundle", **options)
    assert list(tmp_path.iterdir()) == []


_MEMORY = """
import json, sys, torch
from pathlib import Path
import transformers, accelerate
from ciphertune.bundle.writer import split
from ciphertune.plugins.manager import plugin_manager
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return {l.split(":")[0]: int(l.split()[1]) * 1024 for l in lines if l.startswith(("VmHWM", "VmRSS", "RssAnon"))}
torch.set_num_threads(1)
getattr(transformers, "LlamaForCausalLM"), plugin_manager()
before = peak()["RssAnon"]
import threading, time
most, done = [0], threading.Event()
def watch():
    while not done.is_set():
        most[0] = max(most[0], peak()["RssAnon"])
        time.sleep(0.005)
thread = threading.Thread(target=watch)
thread.start()
split(sys.argv[1], sys.argv[2])
done.set()
thread.join()
print(json.dumps(most[0] - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_splitting_takes_little_memory(tmp_path: Path) -> None:
    sizes = {"vocab_size": 2000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 20}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    models.llama(**sizes, **heads, tie_word_embeddings=True).save_pretrained(tmp_path / "model", max_shard_size="50MB")
    size = sum(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors"))
    assert size > 300e6
    run = warm.run(_MEMORY, str(tmp_path / "model"), str(tmp_path / "bundle"), preload=warm.CLIENT)
    assert run.returncode == 0, run.stderr
    # Two blocks of codes, chunks of 4 million values in float32 and float64, and what imports on the way take.
    assert json.loads(run.stdout.splitlines()[-1]) < 0.45 * size


@pytest.mark.parametrize("rows", [(0, 1), (0, 2), (1, 2), (2, 3)])
def test_a_worker_serves_rows_of_a_whole_bundle_as_of_one_that_was_split(tmp_path: Path, rows: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 300), nn.Linear(300, 20), nn.Linear(20, 130))
    whole = ciphertune.split(model, tmp_path / "whole")
    cut = ciphertune.split(model, tmp_path / "cut", workers=rows[1])
    found = load_worker(whole.workers[0], rows=rows)
    assert read_manifest(found.manifest()) == read_manifest(load_worker(cut.workers[rows[0]]).manifest())
    named = load_worker(whole.workers[0], layers=["2"], rows=rows)
    assert {shard.name for block in read_manifest(named.manifest()) for shard in block} <= {"2"}


def test_placements_are_read_and_cover_every_row() -> None:
    assert Placement.read("layers", 3) == Placement.read("layers:3") == Placement(layers=3)
    assert str(Placement.read("rows:4,layers:2", 8)) == "layers:2,rows:4"
    for text, workers in (
        ("rows", None),
        ("rows:2", 3),
        ("rows,layers", 4),
        ("rows:2,rows:2", 4),
        ("rows:0", 1),
        ("", 1),
    ):
        with pytest.raises(ConfigError, match="placement"):
            Placement.read(text, workers)
    for placed in (Placement(2, 2, 2), Placement(layers=3), Placement(rows=3), Placement(replicas=2)):
        for middle in (0.0, 0.4, 0.99):
            rows = [placed.rows_of(worker, 500, middle) for worker in range(placed.workers)]
            held = [row for first, last in rows for row in range(first, last)]
            assert sorted(held) == sorted(list(range(500)) * placed.replicas)
