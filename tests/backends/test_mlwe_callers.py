"""Callers of one session: no secret masks tokens of two of them."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from mask_bench import FEATURES, OUTPUTS, Bench, read
from mlwe_halves import Halves, error_of, random_codes
from seen import seen_by
from torch import nn

import ciphertune
from ciphertune.callers import batch_of, owners_of
from ciphertune.errors import SecurityError
from ciphertune.plugins import registry
from ciphertune_mlwe.masks import Block, Mask, MaskStock

CALLERS = ("ann", "bob", "cleo")


def owner_of_blocks(bench: Bench, taken: list[tuple[str, torch.Tensor]]) -> list[set[str]]:
    """Who got columns of each block that was made."""
    return [
        {caller for caller, body in taken if bool((made.t()[:, None] == body.t()[None]).all(2).any())}
        for made in bench.bodies
    ]


@given(st.lists(st.tuples(st.sampled_from(CALLERS), st.integers(1, 12)), min_size=1, max_size=40), st.booleans())
def test_a_block_of_masks_is_of_one_caller(takes: list[tuple[str, int]], tight: bool) -> None:
    bench = Bench(columns=16, banked=16 * 4 * (FEATURES + OUTPUTS) if tight else 1 << 30)
    taken = [(caller, read(bench.stock.take("a", tokens, caller))) for caller, tokens in takes]
    owners = owner_of_blocks(bench, taken)
    assert all(len(found) == 1 for found in owners), "every block was used, by one caller"
    columns = torch.cat([body for _, body in taken], dim=1)
    assert torch.unique(columns, dim=1).shape == columns.shape
    bench.stock.close()


def test_banks_of_who_asked_least_lately_go_first() -> None:
    size = 16 * 4 * (FEATURES + OUTPUTS)
    bench = Bench(columns=16, banked=2 * size)
    for caller in ("ann", "bob", "ann", "cleo", "ann"):
        bench.stock.take("a", 1, caller)
    assert len(bench.made) == 3, "Cleo's took the place of Bob's, who asked before Ann"
    bench.stock.take("a", 1, "bob")
    assert len(bench.made) == 4
    bench.stock.close()


def test_banks_are_smaller_for_more_callers() -> None:
    client = Halves(random_codes(64, 64)).client
    client._mask_bytes = 4 * 256 * 256
    client._bank_columns.clear()
    assert [client._columns(callers) for callers in (1, 2, 4, 100)] == [256, 128, 64, 32]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("options", [{}, {"banks": "0"}, {"pad_tokens": "8"}])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_product_of_several_callers_decrypts(direction: Any, options: dict[str, str], bits: int) -> None:
    halves = Halves(random_codes(40, 33, bits), None, 64, **options)
    x = torch.randn(7, halves.maps[direction].in_features, generator=torch.Generator().manual_seed(0))
    whole = halves.maps[direction]
    (sent,) = halves.client.encrypt_owned(x, whole, [whole], (("ann", 1), ("bob", 5), ("ann", 1)))
    reply = halves.worker.evaluate(halves.worker.prepare(halves.codes), direction, sent.buffers)
    found = halves.client.decrypt(reply, sent.state, whole)
    assert error_of(found, halves.exact(x, direction)) < 0.02
    halves.client.close()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[int]]:
    """Numbers of the blocks that each caller's masks were of."""
    found: dict[str, set[int]] = defaultdict(set)
    blocks: list[Block] = []
    take = MaskStock.take

    def recorded(stock: MaskStock, product: str, tokens: int, caller: str = "", *message: Any) -> Mask:
        mask = take(stock, product, tokens, caller, *message)
        assert mask._block is not None
        blocks.append(mask._block)  # kept, so that its place in memory is no other's
        found[caller].add(id(mask._block))
        return mask

    monkeypatch.setattr(MaskStock, "take", recorded)
    return found


@pytest.fixture
def apart(tiny: Callable[[str], Any]) -> Iterator[nn.Module]:
    """A model whose session keeps callers apart."""
    model = ciphertune.outsource(tiny("llama"), to="mlwe?ahead=0")
    ciphertune.session_of(model).keep_apart()
    yield model
    ciphertune.session_of(model).close()


def test_a_batch_of_several_callers(apart: Any, tiny: Callable[[str], Any], taken: dict[str, set[int]]) -> None:
    ids = torch.arange(12).view(4, 3)
    with torch.no_grad(), batch_of(["ann", "bob", "bob", "cleo"]):
        for _ in range(2):
            found = apart(ids).logits
    expected = tiny("llama")(ids).logits
    assert error_of(found, expected.double().detach()) < 0.05
    assert set(taken) == set(CALLERS)
    assert not taken["ann"] & taken["bob"]
    assert not taken["ann"] & taken["cleo"]
    assert not taken["bob"] & taken["cleo"]


def test_a_batch_of_one_caller_may_have_any_shape(apart: Any, taken: dict[str, set[int]]) -> None:
    layer = ciphertune.outsourced_layers(apart)[0]
    with torch.no_grad(), batch_of(["ann", "ann"]):
        layer(torch.randn(5, layer.in_features))
    assert set(taken) == {"ann"}


def test_without_a_caller_nothing_is_sent(apart: Any) -> None:
    seen = seen_by(ciphertune.session_of(apart).worker)
    layer = ciphertune.outsourced_layers(apart)[0]
    with pytest.raises(SecurityError, match="whose these 3 tokens"):
        apart(torch.arange(3)[None])
    # Tokens of several callers in an order that nobody knows, as where an expert gets some of each.
    for shape in ((2, layer.in_features), (3, 2, layer.in_features)):
        with torch.no_grad(), batch_of(["ann", "bob"]), pytest.raises(SecurityError, match="does not tell"):
            layer(torch.randn(*shape))
    assert seen == []


def test_a_backend_with_one_secret_is_refused(register: Any, tiny: Callable[[str], Any]) -> None:
    from ciphertune_clear import ClearBackend

    class OneKey(ClearBackend):
        name = "one-key"
        separates_callers = False

    register(registry.BACKENDS, OneKey)
    model = ciphertune.outsource(tiny("llama"), to="one-key")
    with pytest.raises(SecurityError, match="a session for each caller"):
        ciphertune.session_of(model).keep_apart()


def test_rows_are_of_whom_the_batch_says() -> None:
    assert owners_of((2, 3, 8)) is None
    with batch_of(["ann", "bob", "bob"]):
        assert owners_of((3, 5, 8)) == (("ann", 5), ("bob", 10))
        with batch_of(["ann"]):
            assert owners_of((4, 8)) == (("ann", 4),)
    assert owners_of((3, 5, 8)) is None
