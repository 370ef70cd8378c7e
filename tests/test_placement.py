"""Which worker evaluates which rows."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ciphertune.errors import UnknownLayerError
from ciphertune.placement import Piece, place
from ciphertune.weights import DIGEST_ROWS, LayerInfo, Shard, describe, quantize


def layer(name: str, rows: int, columns: int = 4, seed: int = 0) -> LayerInfo:
    generator = torch.Generator().manual_seed(seed + sum(name.encode()))
    return describe(name, quantize(torch.randn(rows, columns, generator=generator), 8))


Q, K, V = layer("q", 128), layer("k", 64), layer("v", 70)


def placed(units: list[list[LayerInfo]], *workers: list[list[Shard]]) -> list[tuple[Piece, ...]]:
    return place(units, dict(enumerate(workers)), {i: f"host{i}:1" for i in range(len(workers))})


def test_a_worker_with_a_whole_group_evaluates_it_as_one() -> None:
    ((piece,), (single,)) = placed([[Q, K, V], [K]], [[Q.shard(), K.shard(), V.shard()]])
    assert (piece.names, piece.workers, piece.whole) == (("q", "k", "v"), (0,), True)
    assert (piece.forward.in_features, piece.forward.out_features) == (4, 262)
    assert (piece.backward.in_features, piece.backward.out_features) == (262, 4)
    assert (single.names, single.whole) == (("k",), True)


def test_layers_that_do_not_lie_below_each_other_are_apart() -> None:
    (pieces,) = placed([[Q, K, V]], [[Q.shard(), V.shard()], [K.shard()]])
    assert [piece.names for piece in pieces] == [("q", "v"), ("k",)] or len(pieces) == 3
    assert not any(piece.whole for piece in pieces)


def test_replicas_hold_a_piece_together() -> None:
    blocks = [[Q.shard(), K.shard(), V.shard()]]
    ((piece,),) = placed([[Q, K, V]], blocks, blocks, [])
    assert piece.workers == (0, 1)


def test_rows_of_a_group_are_one_piece_at_each_worker() -> None:
    first = [[Q.shard(0, 64), K.shard(0, 64), V.shard(0, 64)]]
    second = [[Q.shard(64), V.shard(64)]]
    (pieces,) = placed([[Q, K, V]], first, second)
    assert [(p.names, p.workers) for p in pieces] == [(("q", "k", "v"), (0,)), (("q", "v"), (1,))]
    assert [(s.start, s.stop, s.row) for s in pieces[1].segments] == [(64, 128, 64), (64, 70, 128 + 64 + 64)]
    assert [p.forward.out_features for p in pieces] == [192, 70]


def test_a_whole_layer_is_preferred_to_parts_of_it() -> None:
    ((piece,),) = placed([[Q]], [[Q.shard(0, 64)]], [[Q.shard()]], [[Q.shard(64)]])
    assert (piece.workers, piece.whole) == ((1,), True)


@pytest.mark.parametrize(
    ("held", "why"),
    [
        ([], "no worker has it"),
        ([[Q.shard(0, 64)]], "only rows 0 to 64 of 128 are held"),
        ([[layer("q", 128, seed=9).shard()]], "host0:1 holds another weight under this name"),
        ([[layer("q", 192).shard()]], r"here it is \(128, 4\) in 8 bits, there \(192, 4\) in 8 bits"),
        ([[dataclasses.replace(Q.shard(), weight_bits=16)]], "there .* in 16 bits"),
        ([[dataclasses.replace(Q.shard(), start=1)]], "holds another weight|only rows"),
        ([[dataclasses.replace(Q.shard(0, 64), start=64, stop=128)]], "holds another weight"),
        ([[Q.shard(0, 64)], [dataclasses.replace(Q.shard(0, 64), start=32, stop=128)]], "holds another weight"),
    ],
)
def test_what_is_missing_is_named_with_the_reason(held: list[list[Shard]], why: str) -> None:
    with pytest.raises(UnknownLayerError, match=rf"host0:1.*1 of the layers: q: .*({why})"):
        placed([[Q]], held)


def test_many_missing_layers_are_counted() -> None:
    layers = [layer(f"l{i}", 8) for i in range(9)]
    with pytest.raises(UnknownLayerError, match=r"9 of the layers: l0: .*l4: .*and 4 more"):
        placed([[info] for info in layers], [])


@given(st.data())
def test_every_row_is_evaluated_once_by_workers_that_hold_it(data: st.DataObject) -> None:
    units = [
        [layer(f"u{u}.{i}", data.draw(st.sampled_from([8, 64, 100, 200]))) for i in range(data.draw(st.integers(1, 3)))]
        for u in range(data.draw(st.integers(1, 3)))
    ]
    count = data.draw(st.integers(1, 4))
    blocks: list[list[list[Shard]]] = [[] for _ in range(count)]
    for unit in units:
        for info in unit:
            borders = range(DIGEST_ROWS, info.out_features, DIGEST_ROWS)
            cuts = [0, *(b for b in borders if data.draw(st.booleans())), info.out_features]
            order = data.draw(st.permutations(range(count)))
            parts = list(itertools.pairwise(cuts))[:count]
            parts[-1] = (parts[-1][0], info.out_features)
            for worker, (start, stop) in zip(order, parts, strict=False):
                new = not blocks[worker] or data.draw(st.booleans())
                blocks[worker] += [[]] if new else []
                blocks[worker][-1].append(info.shard(start, stop))
    held = {(w, s.name): s for w, worker in enumerate(blocks) for block in worker for s in block}
    for unit, pieces in zip(units, placed(units, *blocks), strict=True):
        rows: list[int] = []
        offsets = dict(
            zip(
                (i.name for i in unit),
                torch.tensor([0, *(i.out_features for i in unit)]).cumsum(0).tolist(),
                strict=False,
            )
        )
        for piece in pieces:
            assert piece.forward.out_features == sum(s.stop - s.start for s in piece.segments)
            for segment in piece.segments:
                assert segment.row == offsets[segment.layer] + segment.start
                rows += range(segment.row, segment.row + segment.stop - segment.start)
            for worker in piece.workers:
                flat = [[(s.name, s.start, s.stop) for s in block] for block in blocks[worker]]
                wanted = [(s.layer, s.start, s.stop) for s in piece.segments]
                assert any(wanted == block[i : i + len(wanted)] for block in flat for i in range(len(block)))
        assert sorted(rows) == list(range(sum(info.out_features for info in unit)))
    assert held
