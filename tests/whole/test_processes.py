"""Several processes: each has a session of its own, and data loaders need none."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import ciphertune
from ciphertune.errors import OutsourcedWeightError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    model[1].requires_grad_(False)
    return model


def rows() -> Tensor:
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(5))


_RANK = """
import json, runpy, sys
file, name, arguments, sys.path[:] = json.loads(sys.argv[1])
runpy.run_path(file)[name](*arguments)
"""


def in_two_processes(function: Callable[..., None], *arguments: Any) -> None:
    """Call a function of this module with its rank and what is given, in two processes at once, until both end."""
    started = []
    for rank in range(2):
        told = json.dumps([__file__, function.__name__, [rank, *arguments], sys.path])
        started.append(warm.start([told], (*warm.CLIENT, "torch.distributed.fsdp"), code=_RANK))
    try:
        assert [process.wait(300) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
            process.wait(60)
            assert process.stdout is not None
            process.stdout.close()


def one_of_two(rank: int, port: int, out: str) -> None:
    """A process of a run with accelerate, which puts DistributedDataParallel around the model."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= address | {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    from accelerate import Accelerator

    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    model = ciphertune.outsource(net(), to="mlwe", layers=["1"])
    wrapped = accelerator.prepare(model)
    assert isinstance(wrapped, nn.parallel.DistributedDataParallel)
    accelerator.backward(wrapped(rows()[rank * 4 : rank * 4 + 4]).square().mean())
    torch.save(model[0].weight.grad, Path(out) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_average_their_gradients(tmp_path: Path) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    in_two_processes(one_of_two, port, str(tmp_path))
    plain = net()
    plain(rows()).square().mean().backward()
    wanted = plain[0].weight.grad
    assert isinstance(wanted, Tensor)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first, second)
    assert float((first - wanted).norm() / wanted.norm()) < 0.03


def one_of_two_shards(rank: int, port: int, out: str, kind: str) -> None:
    """A process of a run whose parameters are sharded by FSDP, of either kind."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= address | {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    model: Any = ciphertune.outsource(net(), to="mlwe", layers=["1"])
    if kind == "fully_shard":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for part in (*model, model):
            fully_shard(part, mesh=mesh)
    else:
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy

        policy = ModuleWrapPolicy({nn.Linear}) if kind == "FSDP of layers" else None
        cpu = torch.device("cpu")
        model = FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=cpu, use_orig_params=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(rows()[rank * 4 : rank * 4 + 4]).square().mean().backward()
    optimizer.step()
    if kind == "fully_shard":
        whole = {name: value.full_tensor() for name, value in model.named_parameters()}
    else:
        with FullyShardedDataParallel.summon_full_params(model):
            found = {name.replace("_fsdp_wrapped_module.", ""): p.clone() for name, p in model.named_parameters()}
        whole = found
    torch.save({name: value.detach() for name, value in whole.items()}, Path(out) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fully_shard", "FSDP", "FSDP of layers"])
def test_sharded_parameters_are_trained_as_whole_ones(kind: str, tmp_path: Path) -> None:
    if kind == "fully_shard":
        pytest.importorskip("torch.distributed.fsdp._fully_shard", reason="a later torch has it")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    in_two_processes(one_of_two_shards, port, str(tmp_path), kind)
    plain = net()
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    plain(rows()).square().mean().backward()
    torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=1.0).step()
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert {name for name, _ in plain.named_parameters()} - first.keys() == {"1.weight"}
    for name, value in first.items():
        assert torch.equal(value, second[name])
        moved = plain.get_parameter(name).detach() - before[name]
        assert float((value - before[name] - moved).norm()) <= 0.03 * float(moved.norm())


LAUNCHED = """
import sys
import torch
from accelerate import Accelerator
import ciphertune

torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 16), torch.nn.Linear(16, 4))
model[1].requires_grad_(False)
ciphertune.outsource(model, to="mlwe", layers=["1"])
wrapped = accelerator.prepare(model)
rank = accelerator.process_index
rows = torch.randn(8, 8, generator=torch.Generator().manual_seed(5))
accelerator.backward(wrapped(rows[rank * 4 : rank * 4 + 4]).square().mean())
torch.save([accelerator.num_processes, model[0].weight.grad], f"{sys.argv[1]}/{rank}.pt")
accelerator.end_training()
"""


@pytest.mark.slow
def test_accelerate_in_two_launched_processes(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(LAUNCHED)
    # What ``accelerate launch`` runs for several processes, but on CPUs, where it wants MPI.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = warm.completed([*command, str(script), str(tmp_path)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    plain = net()
    plain(rows()).square().mean().backward()
    wanted = plain[0].weight.grad
    assert isinstance(wanted, Tensor)
    (count, first), (_, second) = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert count == 2
    assert torch.equal(first, second)
    assert float((first - wanted).norm() / wanted.norm()) < 0.03


class Rows(Dataset[Tensor]):
    """The rows, and whatever else a data set may hold."""

    def __init__(self, held: Any = None) -> None:
        self.held = held

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        return rows()[index]


@pytest.mark.slow
@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_data_loaders_with_processes(start: str) -> None:
    if start not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {start}")
    model = ciphertune.outsource(net(), to="mlwe", layers=["1"])
    model(rows())
    loader = DataLoader(Rows(), batch_size=4, num_workers=1, multiprocessing_context=start)
    for batch in loader:
        model(batch).square().mean().backward()
    found, wanted = model(rows()), net()(rows())
    assert float((found - wanted).detach().norm() / wanted.detach().norm()) < 0.03
    assert model[0].weight.grad is not None


def test_a_data_set_that_holds_the_model_is_told_of() -> None:
    model = ciphertune.outsource(net(), to="clear", layers=["1"])
    loader = DataLoader(Rows(model), num_workers=1, multiprocessing_context="spawn")
    with pytest.raises(OutsourcedWeightError, match="a data loader's processes need the data alone"):
        iter(loader)
