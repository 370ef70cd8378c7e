"""Which worker evaluates which rows."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

from ciphertune.client.placement import Piece, place
from ciphertune.errors import ProtocolError, UnknownLayerError
from ciphertune.weights import DIGEST_ROWS, LayerInfo, Shard, describe, quantize, read_manifest


def layer(name: str, rows: int, columns: int = 4, seed: int = 0) -> LayerInfo:
    generator = torch.Generator().manual_seed(seed + sum(name.encode()))
    return describe(name, quantize(torch.randn(rows, columns, generator=generator), 8))


Q, K, V = layer("q", 128), layer("k", 64), layer("v", 70)


LONG, OTHER = layer("long", 150), layer("long", 150, seed=3)


def placed(groups: list[list[LayerInfo]], *workers: list[list[Shard]]) -> list[tuple[Piece, ...]]:
    return place(groups, dict(enumerate(workers)), {i: f"host{i}:1" for i in range(len(workers))})


def test_a_worker_with_a_whole_group_evaluates_it_as_one() -> None:
    ((piece,), (single,)) = placed([[Q, K, V], [K]], [[Q.shard(), K.shard(), V.shard()]])
    assert (piece.names, piece.workers, piece.whole) == (("q", "k", "v"), (0,), True)
    assert (piece.forward.in_features, piece.forward.out_features) == (4, 262)
    assert (piece.backward.in_features, piece.backward.out_features) == (262, 4)
    assert (single.names, single.whole) == (("k",), True)


def test_layers_that_do_not_lie_below_each_other_are_apart() -> None:
    (pieces,) = placed([[Q, K, V]], [[Q.shard(), V.shard()], [K.shard()]])
    assert [piece.names for piece in pieces] == [("q", "v"), ("k",)]
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
    assert pieces[1].shards == (Q.shard(64), V.shard(64))
    assert pieces[1].forward.rows == ((64, 128), (128 + 64 + 64, 262))
    assert [p.forward.out_features for p in pieces] == [192, 70]


def test_a_whole_layer_is_preferred_to_parts_of_it() -> None:
    ((piece,),) = placed([[Q]], [[Q.shard(0, 64)]], [[Q.shard()]], [[Q.shard(64)]])
    assert (piece.workers, piece.whole) == ((1,), True)


def test_replicas_with_other_blocks_are_asked_layer_by_layer() -> None:
    (pieces,) = placed([[Q, K]], [[Q.shard(), K.shard()]], [[Q.shard()], [K.shard()]])
    assert [(piece.names, piece.workers) for piece in pieces] == [(("q",), (0, 1)), (("k",), (0, 1))]


def test_layers_in_another_order_are_not_merged() -> None:
    (pieces,) = placed([[Q, K, V]], [[V.shard(), K.shard(), Q.shard()]])
    assert [piece.names for piece in pieces] == [("q",), ("k",), ("v",)]


def test_a_cut_that_leads_nowhere_is_not_taken() -> None:
    # From row 0 the larger part, held twice at that, cannot be gone on from.
    larger = [[LONG.shard(0, 128)]]
    (pieces,) = placed([[LONG]], larger, larger, [[LONG.shard(0, 64)]], [[LONG.shard(64)]])
    assert [(piece.workers, piece.shards[0].stop) for piece in pieces] == [((2,), 64), ((3,), 150)]


def test_of_two_cuts_the_one_with_more_replicas_is_taken() -> None:
    first, second = [[LONG.shard(0, 64)]], [[LONG.shard(64)]]
    (pieces,) = placed([[LONG]], [[LONG.shard(0, 128)]], [[LONG.shard(128)]], first, first, second, second)
    assert [piece.workers for piece in pieces] == [(2, 3), (4, 5)]


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


HALVES = [LONG.shard(0, 64), LONG.shard(64)]
LIES: dict[str, tuple[list[Shard], str]] = {
    "no digest": ([dataclasses.replace(LONG.shard(), digest="")], "host0:1 holds another weight"),
    "another digest": ([HALVES[0], dataclasses.replace(HALVES[1], digest=LONG.digest(0, 64))], "host1:1 holds another"),
    "the whole digest": ([dataclasses.replace(HALVES[0], digest=LONG.digest()), HALVES[1]], "host0:1 holds another"),
    "a half of another weight": ([HALVES[0], OTHER.shard(64)], "host1:1 holds another weight"),
    "other columns": ([layer("long", 150, columns=5).shard()], r"here .* there \(150, 5\) in 8 bits"),
    "a gap": ([HALVES[0], LONG.shard(128)], "only rows 0 to 64, 128 to 150 of 150 are held"),
    "an overlap": ([LONG.shard(0, 128), HALVES[1]], "only rows 0 to 128, 64 to 150 of 150 are held"),
    # Digests cover 64 rows each, so that these are those of rows 0 to 64 and 64 to 150.
    "a cut that digests do not see": (
        [dataclasses.replace(HALVES[0], stop=50), dataclasses.replace(HALVES[1], start=50)],
        "host0:1, host1:1 holds another weight",
    ),
    "a row less": ([HALVES[0], dataclasses.replace(HALVES[1], stop=149)], "host1:1 holds another weight"),
    "a row twice": ([dataclasses.replace(HALVES[0], stop=65), HALVES[1]], "host0:1 holds another weight"),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_is_no_cover_is_never_taken_for_one(lie: str) -> None:
    shards, why = LIES[lie]
    workers = [[[shard]] for shard in shards]
    with pytest.raises(UnknownLayerError, match=f"1 of the layers: long: .*{why}"):
        placed([[LONG]], *workers)
    # It harms nobody who holds the real one.
    ((piece,),) = placed([[LONG]], *workers, [[LONG.shard()]])
    assert piece.workers == (len(shards),)


def plain(shard: Shard, **changes: Any) -> dict[str, Any]:
    return {**dataclasses.asdict(shard), **changes}


@pytest.mark.parametrize(
    ("blocks", "text"),
    [
        ([[plain(Q.shard()), plain(Q.shard())]], "'q' twice"),
        ([[plain(Q.shard(0, 64))], [plain(Q.shard(64))]], "'q' twice"),
        ([[plain(Q.shard(), start=128)]], "rows 128 to 128 of 128"),
        ([[plain(Q.shard(), start=-64)]], "malformed sizes"),
        ([[plain(Q.shard(), stop=192)]], "rows 0 to 192 of 128"),
        ([[plain(Q.shard(), stop=True)]], "malformed sizes"),
        ([[plain(Q.shard(), in_features=0)]], "rows 0 to 128"),
        ([[plain(Q.shard(), out_features=1 << 40, stop=1 << 40)]], "malformed sizes"),
        ([[plain(Q.shard(), in_features=4.0)]], "malformed sizes"),
        ([[plain(Q.shard(), digest=None)]], "digest"),
        ([[plain(Q.shard(), weight_bits=4)]], "format"),
        ([[plain(Q.shard(), name=b"q")]], "name"),
        ([["q"]], "not a map"),
        ([plain(Q.shard())], "list of blocks"),
        (None, "list of blocks"),
    ],
)
def test_malformed_manifests(blocks: Any, text: str) -> None:
    with pytest.raises(ProtocolError, match=text):
        read_manifest(blocks)


def test_manifests_survive_their_plain_form() -> None:
    blocks = [[Q.shard(), K.shard()], [], [V.shard(64)]]
    assert read_manifest([[plain(shard) for shard in block] for block in blocks]) == blocks


@given(st.data())
def test_a_cover_is_found_if_and_only_if_there_is_one(data: st.DataObject) -> None:
    info = layer("any", data.draw(st.integers(1, 320)))
    borders = [*range(0, info.out_features, DIGEST_ROWS), info.out_features]
    spans = st.tuples(st.sampled_from(borders), st.sampled_from(borders)).filter(lambda span: span[0] < span[1])
    held = data.draw(st.lists(st.tuples(spans, st.booleans()), max_size=8))
    shards = [info.shard(*span) for span, _ in held]
    workers = [
        [[shard if real else dataclasses.replace(shard, digest="0" * 64)]]
        for shard, (_, real) in zip(shards, held, strict=True)
    ]
    reached = {0}
    for start, stop in sorted(span for span, real in held if real):
        reached |= {stop} if start in reached else set()
    if info.out_features not in reached:
        with pytest.raises(UnknownLayerError, match="any: "):
            placed([[info]], *workers)
        return
    (pieces,) = placed([[info]], *workers)
    rows = [row for piece in pieces for s in piece.shards for row in range(s.start, s.stop)]
    assert rows == list(range(info.out_features))
    for piece in pieces:
        (shard,) = piece.shards
        assert piece.workers
        assert all(held[worker] == ((shard.start, shard.stop), True) for worker in piece.workers)


def test_many_missing_layers_are_counted() -> None:
    layers = [layer(f"l{i}", 8) for i in range(9)]
    with pytest.raises(UnknownLayerError, match=r"9 of the layers: l0 and 8 more: no worker has it$"):
        placed([[info] for info in layers], [])


@given(st.data())
def test_every_row_is_evaluated_once_by_workers_that_hold_it(data: st.DataObject) -> None:
    groups = [
        [layer(f"u{u}.{i}", data.draw(st.sampled_from([8, 64, 100, 200]))) for i in range(data.draw(st.integers(1, 3)))]
        for u in range(data.draw(st.integers(1, 3)))
    ]
    count = data.draw(st.integers(1, 4))
    blocks: list[list[list[Shard]]] = [[] for _ in range(count)]
    for group in groups:
        for info in group:
            borders = range(DIGEST_ROWS, info.out_features, DIGEST_ROWS)
            cuts = [0, *(b for b in borders if data.draw(st.booleans())), info.out_features]
            order = data.draw(st.permutations(range(count)))
            parts = list(itertools.pairwise(cuts))[:count]
            parts[-1] = (parts[-1][0], info.out_features)
            for worker, (start, stop) in zip(order, parts, strict=False):
                new = not blocks[worker] or data.draw(st.booleans())
                blocks[worker] += [[]] if new else []
                blocks[worker][-1].append(info.shard(start, stop))
    for group, pieces in zip(groups, placed(groups, *blocks), strict=True):
        rows: list[int] = []
        offsets = dict(
            zip(
                (i.name for i in group),
                torch.tensor([0, *(i.out_features for i in group)]).cumsum(0).tolist(),
                strict=False,
            )
        )
        for piece in pieces:
            assert piece.forward.out_features == sum(shard.rows for shard in piece.shards)
            for shard, (start, stop) in zip(piece.shards, piece.forward.rows, strict=True):
                offset = offsets[shard.name]
                assert (start, stop) == (offset + shard.start, offset + shard.stop)
                rows += range(start, stop)
            for worker in piece.workers:
                flat = [[(s.name, s.start, s.stop) for s in block] for block in blocks[worker]]
                wanted = [(s.name, s.start, s.stop) for s in piece.shards]
                assert any(wanted == block[i : i + len(wanted)] for block in flat for i in range(len(block)))
        assert sorted(rows) == list(range(sum(info.out_features for info in group)))
