"""Products of the mlwe backend in pieces: one ciphertext, cut, and decrypted once."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mlwe_halves import Halves, error_of, random_codes

from ciphertune.backend import DIRECTIONS, Direction, Encrypted, LinearMap
from ciphertune.errors import ReplyError
from ciphertune_mlwe.masks import Mask

pytestmark = pytest.mark.usefixtures("two_threads", "code")
Rows = tuple[tuple[int, int], ...]
FEATURES, OUTPUTS, TOKENS = 70, 150, 5
CUTS: list[list[Rows]] = [
    [((0, 150),)],
    [((0, 64),), ((64, 150),)],
    [((64, 128),), ((0, 64), (128, 150))],
    [((0, 10), (80, 90)), ((10, 11), (140, 150)), ((11, 80), (90, 140))],
]


def cut(whole: LinearMap, rows: Rows) -> LinearMap:
    """The map of a piece."""
    count = sum(stop - start for start, stop in rows)
    if whole.direction == "forward":
        return dataclasses.replace(whole, identity="", rows=rows, out_features=count)
    return dataclasses.replace(whole, identity="", rows=rows, in_features=count)


def codes_of(halves: Halves, rows: Rows) -> torch.Tensor:
    """What the piece's worker holds."""
    return torch.cat([halves.codes[start:stop] for start, stop in rows])


def replies(halves: Halves, direction: Direction, sent: list[Encrypted[Any]], maps: list[LinearMap]) -> list[Any]:
    """What is kept of the workers' replies."""
    taken = []
    for request, part in zip(sent, maps, strict=True):
        prepared = halves.worker.prepare(codes_of(halves, part.rows))
        reply = halves.worker.evaluate(prepared, direction, request.buffers)
        halves.client.check_reply(reply, request.state, part)
        taken.append(halves.client.take_reply(reply, request.state, part))
    return taken


@pytest.fixture
def encrypted(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Every ciphertext from now on."""
    found: list[torch.Tensor] = []
    take = Mask.take

    def recorded(mask: Mask, use: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        sent, unit = take(mask, use)
        found.append(sent)
        return sent, unit

    monkeypatch.setattr(Mask, "take", recorded)
    return found


@pytest.mark.parametrize("pieces", CUTS)
@pytest.mark.parametrize("weight_bits", [8, 16])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_pieces_are_cuts_of_one_ciphertext(
    pieces: list[Rows], weight_bits: int, direction: Direction, encrypted: list[torch.Tensor]
) -> None:
    halves = Halves(random_codes(OUTPUTS, FEATURES, weight_bits))
    whole = halves.maps[direction]
    x = torch.randn(TOKENS, whole.in_features, generator=torch.Generator().manual_seed(0))
    maps = [cut(whole, rows) for rows in pieces]
    halves.prepare([cut(halves.maps["forward"], rows) for rows in pieces])
    sent = halves.client.encrypt_pieces(x, whole, maps)
    (b,) = encrypted
    for request, part in zip(sent, maps, strict=True):
        mine = b if direction == "forward" else torch.cat([b[start:stop] for start, stop in part.rows])
        assert torch.equal(request.buffers["b"], mine)
    y = halves.client.put_together(replies(halves, direction, sent, maps), [each.state for each in sent], whole, maps)
    assert y.shape == (TOKENS, whole.out_features)
    assert error_of(y, halves.exact(x, direction)) < 2**-9
    # To the bit what one worker's reply to the whole ciphertext gives.
    reply = halves.worker.evaluate(halves.worker.prepare(halves.codes), direction, {"b": b})
    taken = halves.client.take_reply(reply, sent[0].state, whole)
    assert torch.equal(y, halves.client.put_together([taken], [sent[0].state], whole, [whole]))


@pytest.mark.parametrize("weight_bits", [8, 16])
def test_forward_pieces_come_in_any_order_and_leave_out_rows(weight_bits: int) -> None:
    halves = Halves(random_codes(OUTPUTS, FEATURES, weight_bits))
    whole, x = halves.maps["forward"], torch.randn(TOKENS, FEATURES, generator=torch.Generator().manual_seed(0))
    exact = halves.exact(x)
    parts: list[Rows] = [((64, 128),), ((3, 9), (140, 150)), ((20, 21),)]
    for count in (1, 2, 3):
        for chosen in itertools.permutations(parts, count):
            maps = [cut(whole, rows) for rows in chosen]
            halves.prepare(maps)
            sent = halves.client.encrypt_pieces(x, whole, maps)
            taken = replies(halves, "forward", sent, maps)
            y = halves.client.put_together(taken, [each.state for each in sent], whole, maps)
            kept = [exact[:, start:stop] for start, stop in sorted(itertools.chain(*chosen))]
            assert error_of(y, torch.cat(kept, dim=1)) < 2**-9


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_pieces_whose_replies_are_none_of_the_request(direction: Direction) -> None:
    halves = Halves(random_codes(OUTPUTS, FEATURES))
    whole = halves.maps[direction]
    maps = [cut(whole, rows) for rows in CUTS[1]]
    halves.prepare([cut(halves.maps["forward"], rows) for rows in CUTS[1]])
    sent = halves.client.encrypt_pieces(torch.randn(TOKENS, whole.in_features), whole, maps)
    states = [each.state for each in sent]
    good = replies(halves, direction, sent, maps)
    with pytest.raises(ReplyError, match="bytes"):
        halves.client.put_together([good[0], torch.cat([good[1], good[1][:, :1]], dim=1)], states, whole, maps)
    if direction == "forward":
        with pytest.raises(ReplyError, match="expected uint8"):
            halves.client.take_reply({"y": good[0]}, states[1], maps[1])
