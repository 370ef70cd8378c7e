"""No two messages of the mlwe backend under one mask, whatever a training goes through."""

import dataclasses
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from farm import Farm, Host, never
from mask_bench import at_once, until
from torch import nn

import ciphertune
from ciphertune.errors import CipherTuneError, SecurityError, TransportError
from ciphertune.protocol import Message, error_message
from ciphertune_mlwe.masks import Mask

WIDTH = 12
"""Features of the narrowest product: columns of so many values come near each other by chance once in 2^270."""

LARGEST_ERROR = 256


@dataclasses.dataclass(frozen=True)
class Sealed:
    """What was encrypted under a mask."""

    mask: torch.Tensor
    sent: torch.Tensor


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[Sealed]:
    """Every mask that is used from now on, with what comes of it."""
    found: list[Sealed] = []
    take = Mask.take

    def recorded(mask: Mask, use: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        kept: list[torch.Tensor] = []

        def keep(body: torch.Tensor) -> tuple[torch.Tensor, ...]:
            kept.append(body.clone())
            return use(body)

        sent, unit = take(mask, keep)
        found.append(Sealed(kept[0], sent.clone()))
        return sent, unit

    monkeypatch.setattr(Mask, "take", recorded)
    return found


def check_masks(messages: list[Sealed]) -> None:
    """No two columns of masks are under one secret, with the same error or another, and none is zeros."""
    assert all(bool(each.mask.ne(0).any(0).all()) for each in messages)
    # All masks of a session are of the first rows of one matrix.
    heads = torch.cat([each.mask[:WIDTH].t().long() for each in messages])
    heads = heads[heads[:, 0].argsort()]
    for apart in range(1, 5):
        near = ((heads[apart:] - heads[:-apart]).abs() < LARGEST_ERROR).all(1)
        assert not near.any()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 12))


@pytest.mark.parametrize(
    "options", [pytest.param("", marks=pytest.mark.slow), "ahead=0", "banks=0", "mask_memory=1", "pad_tokens=32"]
)
def test_a_training(options: str, messages: list[Sealed]) -> None:
    """With micro-batches, single tokens, threads and exceptions in between."""
    model = ciphertune.outsource(network(), f"mlwe?{options}", "all")
    inputs = torch.randn(300, 12, requires_grad=True)

    def step(part: torch.Tensor) -> None:
        model(part).square().mean().backward()

    try:
        for _ in range(3):
            step(inputs)
            for part in inputs.split(100):
                step(part)
            for token in range(5):
                with torch.no_grad():
                    model(inputs[token : token + 1])
            outcomes = at_once(*[lambda: step(inputs[:20])] * 2)
            assert [each.exception() for each in outcomes] == [None, None]
            with pytest.raises(CipherTuneError):
                model(torch.zeros(2, 11))
    finally:
        ciphertune.session_of(model).close()
    # Three layers, forwards and backwards, in six steps and forwards for five tokens, three times.
    assert len(messages) == 3 * (6 * 6 + 5 * 3)
    check_masks(messages)


class Wire:
    """What hosts were sent.

    Attributes:
        sent: the buffer of every request for a product.
    """

    def __init__(self, *hosts: Host) -> None:
        self.sent: list[torch.Tensor] = []
        self._lock = threading.Lock()
        for host in hosts:
            self._listen(host)

    def _listen(self, host: Host) -> None:
        script = host.script

        def listening(request: Message) -> Message | None:
            if request.kind == "evaluate":
                with self._lock:
                    self.sent.append(request.buffers["b"].clone())
            return script(request)

        host.script = listening

    def check(self, messages: list[Sealed]) -> None:
        """All that was sent are rows of what was encrypted, each row of a ciphertext in one form only."""
        known = {row.numpy().tobytes() for each in messages for row in each.sent}
        for b in self.sent:
            assert {row.contiguous().numpy().tobytes() for row in b} <= known


class Wide(nn.Module):
    """Layers that share their input, with rows for three workers, and one after them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.q_proj = nn.Linear(40, 200, bias=False)
        self.k_proj = nn.Linear(40, 70, bias=False)
        self.o_proj = nn.Linear(270, 20, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.o_proj(torch.cat([self.q_proj(x), self.k_proj(x)], dim=-1))
        return out


def check(model: Any, tokens: int) -> None:
    x = torch.randn(tokens, 40, generator=torch.Generator().manual_seed(tokens))
    private, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, expected = model(private), Wide()(plain)
    for y in (found, expected):
        y.sum().backward()
    assert private.grad is not None
    assert plain.grad is not None
    for one, other in ((found.detach(), expected.detach()), (private.grad, plain.grad)):
        assert float((one - other).norm() / other.norm()) < 0.02


@pytest.mark.parametrize("tokens", [3, 200])
def test_pieces_at_several_workers(farm: Farm, messages: list[Sealed], tokens: int) -> None:
    hosts = farm.plant(
        Wide(),
        "mlwe",
        one=[[("q_proj", 0, 64), ("k_proj", 0, 64)], ["o_proj"]],
        two=[[("q_proj", 64, 128)]],
        three=[[("q_proj", 128, None), ("k_proj", 64, None)]],
    )
    model = Wide()
    session = farm.outsource(model, "mlwe")
    wire = Wire(*hosts)
    for _ in range(2):
        check(model, tokens)
    assert session.traffic.retries == 0
    products = len(messages)
    assert products == 2 * 4, "one ciphertext a product"
    # The group's rows are at three workers: three requests each way, for one ciphertext.
    assert len(wire.sent) == 2 * (3 + 3 + 1 + 1)
    check_masks(messages)
    wire.check(messages)


@pytest.mark.parametrize("tokens", [3, 200])
def test_retries_and_hedges(farm: Farm, messages: list[Sealed], tokens: int) -> None:
    whole = [["q_proj", "k_proj"], ["o_proj"]]
    first, second = farm.plant(Wide(), "mlwe", one=whole, two=whole)
    model = Wide()
    session = farm.outsource(model, "mlwe", hedge=0.05, timeout=0.5)

    def fails(request: Message) -> Message:
        raise TransportError("the connection was lost")

    def busy(request: Message) -> Message:
        return error_message("busy", "not now")

    first.on("evaluate", fails, never, busy, never)
    second.on("evaluate", busy, fails, never)
    wire = Wire(first, second)
    for _ in range(3):
        check(model, tokens)
    assert session.traffic.retries >= 4
    assert len(messages) == 3 * 4, "what is sent again is the same ciphertext"
    assert len(wire.sent) > len(messages)
    check_masks(messages)
    wire.check(messages)


def test_other_cuts(register: Callable[[str, Any], None], messages: list[Sealed]) -> None:
    """A worker joins in the midst of a training, and what was one piece becomes two."""
    farm = Farm(register, elastic=True)
    try:
        (first,) = farm.plant(Wide(), "mlwe", first=[["q_proj", "k_proj"], ["o_proj"]])
        model = Wide()
        farm.outsource(model, "mlwe")
        check(model, 40)
        (second,) = farm.plant(Wide(), "mlwe", second=[["q_proj"]])
        until(lambda: second.count("open") == 1)
        wire = Wire(first, second)
        for tokens in (40, 3):
            check(model, tokens)
        assert second.count("evaluate") > 0
    finally:
        farm.close()
    assert len(messages) == 3 * 4
    assert len(wire.sent) > 2 * 4
    check_masks(messages)
    wire.check(messages)


def test_layers_alone_and_tasks_in_turns(messages: list[Sealed]) -> None:
    """Layers that turn out to read different inputs, and micro-batches while others wait."""
    model: Any = ciphertune.outsource(Wide(), "mlwe", "all")

    def task(tokens: int) -> None:
        x = torch.randn(tokens, 40, requires_grad=True)
        (model(x).sum() + model.q_proj(x * 2).sum() + model.k_proj(x * 3).sum()).backward()

    try:
        for _ in range(2):
            ciphertune.interleave([lambda: task(40), lambda: task(40), lambda: task(2)])
    finally:
        ciphertune.session_of(model).close()
    assert len(messages) >= 6 * 8
    check_masks(messages)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("tokens", [3, 200])
def test_forks(messages: list[Sealed], tokens: int) -> None:
    """A forked process, which has the same masks in its memory, encrypts nothing with them."""
    model: Any = ciphertune.outsource(Wide(), "mlwe", "all")
    client = ciphertune.session_of(model)._keys.client
    whole = ciphertune.session_of(model)._groups[0].maps["forward"]
    x = torch.randn(tokens, 40)
    try:
        for _ in range(3):
            check(model, tokens)
            child = os.fork()
            if child == 0:
                status = 0
                for encrypt in (lambda: model(x), lambda: client.encrypt(x, whole)):
                    try:
                        encrypt()
                        status = 1
                    except SecurityError:
                        pass
                    except BaseException:  # the child must end here
                        status = 2
                os._exit(status)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        ciphertune.session_of(model).close()
    assert len(messages) == 3 * 4
    check_masks(messages)


def test_sessions_that_share_a_matrix(messages: list[Sealed], empty_cache: Path) -> None:
    """Two at once and one later, of one client and one model, whose hints on disk are of one public matrix."""
    models: list[Any] = [ciphertune.outsource(Wide(), "mlwe", "all") for _ in range(2)]
    try:
        for _ in range(2):
            for model in models:
                check(model, 3)
        ciphertune.session_of(models[0]).close()
        models.append(ciphertune.outsource(Wide(), "mlwe", "all"))
        check(models[2], 200)
        check(models[1], 200)
        clients: list[Any] = [ciphertune.session_of(model)._keys.client for model in models]
        matrices = {bytes(client._public._prefix.digest(32)) for client in clients}
        assert len(matrices) == 1
    finally:
        for model in models:
            ciphertune.session_of(model).close()
    assert len(messages) == 6 * 4
    check_masks(messages)


def test_products_that_fail(farm: Farm, messages: list[Sealed]) -> None:
    """What was encrypted for a product that fails is not used for the next."""
    (host,) = farm.plant(Wide(), "mlwe", one=[["q_proj", "k_proj"], ["o_proj"]])
    model = Wide()
    farm.outsource(model, "mlwe")
    for _ in range(3):
        host.on("evaluate", lambda request: error_message("internal", "no"))
        with pytest.raises(CipherTuneError):
            model(torch.ones(3, 40))
        check(model, 3)
    assert len(messages) == 3 * 5
    check_masks(messages)
