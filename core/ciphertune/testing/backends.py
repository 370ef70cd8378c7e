"""Conformance suite of backends."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import ciphertune
from ciphertune.backend import (
    DIRECTIONS,
    INTERFACE_VERSION,
    Backend,
    Buffers,
    ClientHalf,
    Direction,
    Encrypted,
    LinearMap,
    Preparation,
    WorkerHalf,
)
from ciphertune.client.choice import choose
from ciphertune.client.noise_checks import DEVIATIONS, NoiseChecks, checkable
from ciphertune.errors import NotPreparedError, ProtocolError, ReplyError, WrongReplyError
from ciphertune.protocol import Message, pack, unpack
from ciphertune.testing.lies import LIES, LyingWorker
from ciphertune.testing.served import ServedWorker
from ciphertune.weights import DIGEST_ROWS, LayerWeight, describe, group_map, lookup_map, quantize

_CPU = torch.device("cpu")


def _carried(buffers: Buffers) -> Buffers:
    """Pass buffers through their wire form, as the other side gets them."""
    return unpack([bytes(frame) for frame in pack(Message("ok", {}, buffers))]).buffers


@dataclasses.dataclass
class Pair:
    """Both halves of a backend around one weight, with a wire between them."""

    backend: Backend
    client: ClientHalf[Any]
    worker: WorkerHalf
    weight: LayerWeight
    prepared: Any

    @classmethod
    def make(cls, selection: str, out_features: int, in_features: int, seed: int = 0, *, prepared: bool = True) -> Pair:
        """A backend with fresh keys around a random weight, prepared for whole products unless told otherwise."""
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(out_features, in_features, generator=generator) / math.sqrt(in_features)
        backend = choose(selection).backend
        weight = quantize(values, backend.weight_bits)
        client = backend.client(_CPU)
        opening = Message("open", {"public": dict(client.open_fields())}, client.evaluation_key())
        opened = unpack([bytes(frame) for frame in pack(opening)])
        worker = type(backend).worker(opened.fields["public"], opened.buffers, _CPU)
        pair = cls(backend, client, worker, weight, worker.prepare(weight.codes))
        if prepared:
            pair.prepare()
        return pair

    def prepare(self, pieces: Sequence[LinearMap] = ()) -> None:
        """Let the client half prepare itself for products that are cut into pieces, by forward maps of these."""
        self._absorbed(self.client.preparation(self.map("forward"), self.map("backward"), pieces))

    def prepare_lookups(self) -> None:
        """Let the client half prepare itself for lookups in the weight as a table."""
        self._absorbed(self.client.preparation(None, self.lookups(), ()))

    def _absorbed(self, preparation: Preparation | None) -> None:
        if preparation is not None:
            for row in range(0, len(self.weight.codes), DIGEST_ROWS):
                preparation.absorb(row, self.weight.codes[row : row + DIGEST_ROWS])
            preparation.finish()

    def map(self, direction: Direction) -> LinearMap:
        """The map of a direction, as a session knows it."""
        return group_map([describe("layer", self.weight)], direction)

    def lookups(self) -> LinearMap:
        """The map of lookups in the weight as a table of embeddings, as a session knows it."""
        return lookup_map(describe("table", self.weight))

    def matrix(self, direction: Direction) -> Tensor:
        """The matrix of a direction in float64, as the worker stores it, without scales."""
        codes = self.weight.codes.double()
        return codes if direction == "forward" else codes.t()

    def encrypt(self, x: Tensor, linear_map: LinearMap) -> Encrypted[Any]:
        """A request, once the client half has prepared itself again where it has to."""
        try:
            return self.client.encrypt(x, linear_map)
        except NotPreparedError:
            if linear_map.identity == self.lookups().identity:
                self.prepare_lookups()
            else:
                self.prepare()
            return self.client.encrypt(x, linear_map)

    def evaluate(self, direction: Direction, request: Buffers) -> Buffers:
        """A request's reply, through the wire both ways."""
        return _carried(self.worker.evaluate(self.prepared, direction, _carried(request)))

    def product(self, direction: Direction, x: Tensor, linear_map: LinearMap | None = None) -> Tensor:
        """Encrypt, evaluate, decrypt; of another map than the direction's if one is given."""
        linear_map = self.map(direction) if linear_map is None else linear_map
        encrypted = self.encrypt(x, linear_map)
        return self.client.decrypt(self.evaluate(direction, encrypted.buffers), encrypted.state, linear_map)

    def close(self) -> None:
        """Close both halves."""
        self.client.close()
        self.worker.close()


class BackendSuite:
    """Inherit, set ``selection``, and collect with pytest.

    Attributes:
        selection: the backend and its options as in a selection string, without a transport.
        tolerance: error over output (root mean squares) of a backend that declares no ``noise``.
        shapes: (tokens, in_features, out_features) of the products that are checked.
        repeats: encryptions compared in the test of what a request gives away.
        samples, width, steps: of the model that trains, and of its training.
        wire: the transport of the one with a worker elsewhere.
        deterministic: whether the same products in the same order give the same bits in every session.
    """

    selection: ClassVar[str]
    tolerance: ClassVar[float] = 1e-5
    shapes: ClassVar[tuple[tuple[int, int, int], ...]] = ((1, 1, 1), (1, 64, 3), (3, 17, 33), (70, 130, 96))
    repeats: ClassVar[int] = 48
    samples: ClassVar[int] = 48
    width: ClassVar[int] = 32
    steps: ClassVar[int] = 12
    wire: ClassVar[str] = "zmq"
    deterministic: ClassVar[bool] = False

    @pytest.fixture
    def pair(self) -> Iterator[Callable[..., Pair]]:
        """``pair(out_features, in_features)``: halves that are closed when the test ends."""
        made: list[Pair] = []

        def make(out_features: int, in_features: int) -> Pair:
            made.append(Pair.make(self.selection, out_features, in_features))
            return made[-1]

        yield make
        for each in made:
            each.close()

    def check(self, pair: Pair, direction: Direction, x: Tensor, linear_map: LinearMap | None = None) -> None:
        """Hold a product against float64, within the error that the backend declares."""
        linear_map = pair.map(direction) if linear_map is None else linear_map
        y = pair.product(direction, x, linear_map)
        expected = x.double() @ pair.matrix(direction).t()
        assert y.dtype == torch.float32, f"outputs are {y.dtype}, not float32"
        assert y.shape == expected.shape
        assert torch.isfinite(y).all()
        noise = pair.backend.noise(linear_map)
        if noise is None:
            size = float(expected.square().mean().sqrt())
            # Where outputs cancel, float32 can only be held against what was added up.
            size = max(size, float(x.double().norm(dim=1).max()) * linear_map.max_norm * 1e-2)
            assert float((y - expected).square().mean().sqrt()) <= self.tolerance * size
            return
        allowed = noise.error_deviation(linear_map.max_norm) / noise.token_scale(x, linear_map)
        # Float32 outputs cannot be finer than their own last bits.
        allowed = (allowed.square() + (x.double().norm(dim=1) * linear_map.max_norm * 1e-6).square()).sqrt()
        units = (y.double() - expected) / allowed[:, None].clamp_min(1e-300)
        # A mean of n squares of standard normals exceeds 1 + 6·sqrt(2/n) about once in 10^9; 8% is for the model.
        # Errors that a token's outputs share are as few as there are tokens.
        spread = math.sqrt(2 / units.numel()) + noise.correlation * math.sqrt(2 / len(x))
        assert float(units.square().mean()) <= 1.08**2 * (1 + 6 * spread)
        assert float(units.abs().max()) <= 8, "an output lies beyond eight standard deviations of the declared error"

    def test_it_says_which_interface_it_is_written_for(self) -> None:
        """``Backend.interface`` is the version of the interface that it was written for."""
        stated = type(choose(self.selection).backend).interface
        if stated is None:
            pytest.skip(f"it does not say: interface = {INTERFACE_VERSION}")
        assert stated == INTERFACE_VERSION

    @pytest.mark.parametrize("direction", ["forward", "backward"])
    def test_prepared_from_blocks_of_any_size(self, direction: Direction) -> None:
        """A preparation takes rows in blocks of any size, and keeps none of their memory."""
        sizes = (24, 40) if direction == "forward" else (40, 24)
        both = Pair.make(self.selection, *sizes, prepared=False)
        try:
            preparation = both.client.preparation(both.map("forward"), both.map("backward"), ())
            if preparation is None:
                assert not both.backend.prepares, "prepares = True, and there is no preparation"
                pytest.skip("this backend prepares nothing from the codes")
            assert both.backend.prepares, "there is a preparation, and prepares = False: it is never asked for"
            for start, stop in ((0, 1), (1, 9), (9, len(both.weight.codes))):
                block = both.weight.codes[start:stop].clone()
                preparation.absorb(start, block)
                block.fill_(77)
            preparation.finish()
            self.check(both, direction, torch.randn(5, 40, generator=torch.Generator().manual_seed(8)))
        finally:
            both.close()

    @pytest.mark.parametrize("direction", ["forward", "backward"])
    def test_products_have_the_declared_error(self, pair: Callable[..., Pair], direction: Direction) -> None:
        """Any shape, both directions."""
        for index, (tokens, features, outputs) in enumerate(self.shapes):
            both = pair(outputs, features) if direction == "forward" else pair(features, outputs)
            x = torch.randn(tokens, features, generator=torch.Generator().manual_seed(index))
            self.check(both, direction, x)

    @pytest.mark.parametrize("scale", [1e-25, 1e-6, 1.0, 1e6, 1e25])
    def test_scales_of_inputs(self, pair: Callable[..., Pair], scale: float) -> None:
        """Values of any magnitude, within one batch too."""
        x = torch.randn(6, 40, generator=torch.Generator().manual_seed(1)) * scale
        x[1::2] *= 1e-3
        self.check(pair(24, 40), "forward", x)

    def test_inputs_of_every_form(self, pair: Callable[..., Pair]) -> None:
        """Outliers, constants, single values, transposed and strided memory, views of larger tensors."""
        both = pair(24, 40)
        base = torch.randn(80, 80, generator=torch.Generator().manual_seed(2))
        outlier = base[:5, :40].clone()
        outlier[:, 7] *= 3000
        one = torch.zeros(5, 40)
        one[range(5), range(0, 40, 8)] = -2.5
        forms = (outlier, one, torch.full((5, 40), 0.25), base[::2, ::2][:9], base.t()[:7, :40], base[3:4, 40:])
        for x in (*forms, base[:1, :40].expand(4, 40)):
            kept = x.clone()
            self.check(both, "forward", x)
            assert torch.equal(x, kept), "encryption changed its input"

    def test_tokens_of_zeros(self, pair: Callable[..., Pair]) -> None:
        """A token of zeros gives zeros, not noise: gradients have such tokens wherever the loss ignores a position."""
        x = torch.randn(6, 40, generator=torch.Generator().manual_seed(3))
        x[::2] = 0
        y = pair(24, 40).product("forward", x)
        assert float(y[::2].abs().max()) < 1e-20
        assert float(y[1::2].abs().max()) > 1e-2

    def test_lookups_are_rows_of_the_table(self) -> None:
        """Tokens are looked up as backward products of one value each, also of a table that nothing else is made of."""
        both = Pair.make(self.selection, 40, 24, prepared=False)
        try:
            both.prepare_lookups()
            x = torch.zeros(6, 40)
            x[range(5), [0, 39, 7, 7, 20]] = torch.tensor([0.02, 1.0, 3e-4, 3e-4, 5.0])
            self.check(both, "backward", x, both.lookups())
            y = both.product("backward", x, both.lookups())
            assert float(y[5].abs().max()) < 1e-20, "a token without a row is not zeros"
        finally:
            both.close()

    def test_wrong_lookups_are_found(self) -> None:
        """Answers to lookups are held against the table as those to other products are against their weights."""
        both = Pair.make(self.selection, 16, 8, prepared=False)
        linear_map, checks = both.lookups(), NoiseChecks(both.backend, _CPU)
        try:
            if not both.backend.checks_answers:
                if not checkable(both.backend, {"backward": linear_map}):
                    pytest.skip("this backend states no bound of its answers' errors")
                preparation = checks.preparation(None, linear_map)
                assert preparation is not None
                preparation.absorb(0, both.weight.codes)
                preparation.finish()
            both.prepare_lookups()

            def passes(worker: WorkerHalf, prepared: Any, row: int) -> bool:
                x = torch.zeros(1, 16)
                x[0, row] = 0.5
                encrypted = both.encrypt(x, linear_map)
                reply = _carried(worker.evaluate(prepared, "backward", _carried(encrypted.buffers)))
                try:
                    if both.backend.checks_answers:
                        both.client.check_reply(reply, encrypted.state, linear_map)
                        return True
                    y = both.client.decrypt(reply, encrypted.state, linear_map)
                except (ReplyError, WrongReplyError):
                    return False
                return checks.right(linear_map, linear_map, x, y, linear_map, x)

            assert passes(both.worker, both.prepared, 3), "an honest answer was refused"
            other = both.weight.codes.roll(1, 0).contiguous()  # each token gets its neighbour's row
            assert not passes(both.worker, both.worker.prepare(other), 3), "another row of the table was not noticed"
            assert passes(both.worker, both.prepared, 5), "an honest answer was refused"
        finally:
            both.close()

    def test_a_part_of_the_rows(self, pair: Callable[..., Pair]) -> None:
        """A request encrypted for a whole map is answered by a worker that holds some rows of it."""
        both = pair(24, 40)
        x = torch.randn(5, 40, generator=torch.Generator().manual_seed(4))
        encrypted = both.encrypt(x, both.map("forward"))
        whole = both.client.decrypt(both.evaluate("forward", encrypted.buffers), encrypted.state, both.map("forward"))
        codes = both.weight.codes[8:19].contiguous()
        part = dataclasses.replace(both.map("forward"), out_features=len(codes), identity="", rows=((8, 19),))
        both.prepare([part])
        (request,) = both.client.encrypt_pieces(x, both.map("forward"), [part])
        reply = _carried(both.worker.evaluate(both.worker.prepare(codes), "forward", _carried(request.buffers)))
        both.client.check_reply(reply, request.state, part)
        taken = both.client.take_reply(reply, request.state, part)
        found = both.client.put_together([taken], [request.state], both.map("forward"), [part])
        # Each of the two answers has an error of its own.
        spread = float((whole.double() - x.double() @ both.matrix("forward").t()).square().mean().sqrt())
        size = float(whole.square().mean().sqrt())
        assert found.shape == (5, len(codes))
        assert float((found - whole[:, 8:19]).abs().max()) <= 12 * spread + 1e-5 * size

    def test_an_answer_can_be_had_again(self, pair: Callable[..., Pair]) -> None:
        """Evaluation has no effects: a request may be repeated, and either answer decrypts."""
        both = pair(24, 40)
        x = torch.randn(5, 40, generator=torch.Generator().manual_seed(5))
        encrypted = both.encrypt(x, both.map("forward"))
        answers = [
            both.client.decrypt(both.evaluate("forward", encrypted.buffers), encrypted.state, both.map("forward"))
            for _ in range(2)
        ]
        size = float(answers[0].square().mean().sqrt())
        assert float((answers[0] - answers[1]).square().mean().sqrt()) <= 0.25 * size

    def test_the_same_bits_again(self, pair: Callable[..., Pair]) -> None:
        """Products of two sessions are equal bit for bit where the suite declares it."""
        if not self.deterministic:
            pytest.skip("this backend is not declared deterministic")
        inputs = [torch.randn(4, 40, generator=torch.Generator().manual_seed(n)) for n in range(3)]
        first, second = ([both.product("forward", x) for x in inputs] for both in (pair(24, 40), pair(24, 40)))
        for one, other in zip(first, second, strict=True):
            assert torch.equal(one, other)

    def test_requests_under_way_do_not_mix(self, pair: Callable[..., Pair]) -> None:
        """Several requests are encrypted before the first is decrypted, and answered in any order."""
        both = pair(24, 40)
        linear_map = both.map("forward")
        inputs = [torch.randn(3, 40, generator=torch.Generator().manual_seed(n)) for n in range(4)]
        sent = [both.encrypt(x, linear_map) for x in inputs]
        replies = [both.evaluate("forward", one.buffers) for one in sent]
        for n in (2, 0, 3, 1):
            y = both.client.decrypt(replies[n], sent[n].state, linear_map)
            expected = inputs[n].double() @ both.matrix("forward").t()
            assert float((y - expected).norm() / expected.norm()) < 0.5

    @pytest.mark.parametrize("direction", DIRECTIONS)
    def test_evaluated_in_parts_or_together(self, pair: Callable[..., Pair], direction: Direction) -> None:
        """Replies have the same bits when a request is evaluated in parts, and with others where that is possible."""
        both = pair(24, 40)
        linear_map = both.map(direction)
        sent = [both.encrypt(torch.ones(tokens, linear_map.in_features), linear_map).buffers for tokens in (1, 2, 1)]
        alone = [both.worker.evaluate(both.prepared, direction, request) for request in sent]
        ways = [[both.worker.evaluate_in_parts(both.prepared, direction, request, lambda: None) for request in sent]]
        joint = [both.worker.joint(both.prepared, direction, request) for request in sent]
        stated = [each for each in joint if each is not None]
        if both.worker.divisible and len(stated) == len(joint) and len({each.key for each in stated}) == 1:
            assert sum(each.size for each in stated) <= stated[0].most
            ways.append(both.worker.evaluate_together(both.prepared, direction, sent))
        for found in ways:
            for one, other in zip(found, alone, strict=True):
                assert one.keys() == other.keys()
                for name, buffer in one.items():
                    assert torch.equal(buffer, other[name]), "other bits than of ``evaluate``"

    @pytest.mark.parametrize("damage", ["missing", "shorter", "other type", "flat", "empty"])
    def test_requests_that_are_none(self, pair: Callable[..., Pair], damage: str) -> None:
        """A worker refuses what this backend does not send with ``ProtocolError``, whichever buffer it is.

        A request of fewer tokens may be one to the worker; then the client refuses the answer.
        """
        both = pair(24, 40)
        linear_map = both.map("forward")
        encrypted = both.encrypt(torch.ones(3, 40), linear_map)
        for bad in self._damaged(encrypted.buffers, damage):
            try:
                reply = both.worker.evaluate(both.prepared, "forward", bad)
            except ProtocolError:
                continue
            assert damage == "shorter", "the worker evaluated a request that is none"
            with pytest.raises(ReplyError):
                both.client.decrypt(reply, encrypted.state, linear_map)

    @pytest.mark.parametrize("damage", ["missing", "shorter", "other type", "flat", "empty"])
    def test_replies_that_are_none(self, pair: Callable[..., Pair], damage: str) -> None:
        """A client refuses what this backend's worker does not answer with ``ReplyError``."""
        both = pair(24, 40)
        encrypted = both.encrypt(torch.ones(3, 40), both.map("forward"))
        reply = both.worker.evaluate(both.prepared, "forward", encrypted.buffers)
        for bad in self._damaged(reply, damage):
            with pytest.raises(ReplyError):
                both.client.decrypt(bad, encrypted.state, both.map("forward"))

    @staticmethod
    def _damaged(buffers: Buffers, damage: str) -> list[Buffers]:
        if damage == "empty":
            return [{}]
        changes: dict[str, Callable[[Tensor], Tensor]] = {
            "shorter": lambda t: t[..., :-1].clone(),
            "other type": lambda t: t.to(torch.float64 if t.dtype != torch.float64 else torch.int32),
            # One that is flat already gets a dimension more.
            "flat": lambda t: t.reshape(-1) if t.dim() != 1 else t.reshape(1, -1),
        }
        damaged = []
        for name, tensor in buffers.items():
            bad = dict(buffers)
            if damage == "missing":
                del bad[name]
            else:
                bad[name] = changes[damage](tensor)
            damaged.append(bad)
        return damaged

    @pytest.mark.parametrize("direction", ["forward", "backward"])
    def test_what_was_prepared_is_used_up(self, pair: Callable[..., Pair], direction: Direction) -> None:
        """A client half that prepared too little says so before it uses anything up, and goes on once it has more."""
        both = pair(24, 40)
        if not both.backend.prepares:
            pytest.skip("this backend prepares nothing")
        linear_map = both.map(direction)
        inputs = [torch.randn(64, linear_map.in_features, generator=torch.Generator().manual_seed(n)) for n in range(8)]
        sent: list[Encrypted[Any]] = []
        for x in inputs:
            try:
                sent.append(both.client.encrypt(x, linear_map))
            except NotPreparedError:
                with pytest.raises(NotPreparedError):
                    both.client.encrypt(x, linear_map)
                both.prepare()
                sent.append(both.client.encrypt(x, linear_map))
        for x, each in zip(inputs, sent, strict=True):
            y = both.client.decrypt(both.evaluate(direction, each.buffers), each.state, linear_map)
            expected = x.double() @ both.matrix(direction).t()
            assert float((y - expected).norm() / expected.norm()) < 0.5

    @pytest.mark.parametrize("lie", LIES)
    @pytest.mark.parametrize("direction", ["forward", "backward"])
    def test_wrong_answers_are_refused(self, pair: Callable[..., Pair], direction: Direction, lie: str) -> None:
        """A backend that checks answers refuses each lie, before it decrypts; and none of an honest worker's."""
        both = pair(24, 40)
        if not both.backend.checks_answers:
            pytest.skip("this backend does not say that it checks answers before they are decrypted")
        linear_map = both.map(direction)
        liar = LyingWorker(both.worker, lie, honest=1)
        prepared = liar.prepare(both.weight.codes)
        for wrong in (False, True):
            x = torch.randn(3, linear_map.in_features, generator=torch.Generator().manual_seed(6))
            encrypted = both.encrypt(x, linear_map)
            reply = _carried(liar.evaluate(prepared, direction, _carried(encrypted.buffers)))
            if wrong:
                with pytest.raises(WrongReplyError):
                    both.client.check_reply(reply, encrypted.state, linear_map)
            else:
                both.client.check_reply(reply, encrypted.state, linear_map)

    @pytest.mark.parametrize("direction", ["forward", "backward"])
    def test_wrong_answers_are_found_once_decrypted(self, pair: Callable[..., Pair], direction: Direction) -> None:
        """Within the declared error every lie that exceeds it far is found, and no honest answer is taken for one."""
        both = pair(8, 16)
        maps = {each: both.map(each) for each in DIRECTIONS}
        if not checkable(both.backend, maps):
            pytest.skip("this backend checks answers itself, or states no bound of their errors")
        checks, linear_map = NoiseChecks(both.backend, _CPU), maps[direction]
        preparation = checks.preparation(maps["forward"], maps["backward"])
        assert preparation is not None
        preparation.absorb(0, both.weight.codes)
        preparation.finish()

        def told(worker: WorkerHalf, prepared: Any, seed: int) -> tuple[bool, float]:
            """Whether an answer passes, and its error over that of an honest one."""
            x = torch.randn(2, linear_map.in_features, generator=torch.Generator().manual_seed(seed))
            encrypted = both.encrypt(x, linear_map)
            reply = _carried(worker.evaluate(prepared, direction, _carried(encrypted.buffers)))
            try:
                y = both.client.decrypt(reply, encrypted.state, linear_map)
            except ReplyError:
                return False, math.inf
            noise, norm = both.backend.noise(linear_map), x.double().norm(dim=1)
            honest = (both.backend.rounding(linear_map) or 0.0) * linear_map.max_norm * norm
            if noise is not None:
                honest = honest + noise.error_deviation(linear_map.max_norm) / noise.token_scale(x, linear_map)
            off = (y.double() - x.double() @ both.matrix(direction).t()).norm(dim=1)
            passed = checks.right(linear_map, linear_map, x, y, linear_map, x)
            return passed, float((off / honest).nan_to_num(math.inf).max())

        assert all(told(both.worker, both.prepared, seed)[0] for seed in (7, 8)), "an honest answer was refused"
        found = 0
        for lie in ("a row of zeros", "one weight changed", "the top bit of a row", "the answer before"):
            liar = LyingWorker(both.worker, lie)
            prepared = liar.prepare(both.weight.codes)
            if lie == "the answer before":
                told(liar, prepared, 8)
            passed, error = told(liar, prepared, 9)
            # A quarter of the error's norm in the direction of one of 32 vectors is enough.
            if error > 4 * DEVIATIONS * math.sqrt(linear_map.out_features):
                found += 1
                assert not passed, f"{lie}: an error of {error:.3g} deviations was not found"
        assert found, "no lie is larger than the declared error: this backend's answers cannot be checked"

    def test_opening_fields_that_are_none(self, pair: Callable[..., Pair]) -> None:
        """A worker half is not made from public fields of the wrong type."""
        both = pair(2, 4)
        fields, key = dict(both.client.open_fields()), both.client.evaluation_key()
        if not fields:
            pytest.skip("this backend opens without fields")
        for name in fields:
            with pytest.raises(ProtocolError):
                type(both.backend).worker({**fields, name: {"not": "this"}}, key, _CPU)

    def test_a_request_gives_nothing_away(self, pair: Callable[..., Pair]) -> None:
        """What does not change from one encryption to the next must not depend on the data, and nor must any mean.

        Compares many encryptions of an input with as many of another, byte by byte: a position that is constant must
        hold the same byte for both, and the means of every position must agree within eight standard errors. This
        finds activations and scales that are sent as they are or under too little noise; it is no proof of security.
        """
        both = pair(8, 16)
        if not both.backend.security.encrypted:
            pytest.skip("this backend says that it encrypts nothing")
        first = torch.randn(2, 16, generator=torch.Generator().manual_seed(6))
        second = -40 * first.flip(1) + 1000
        second[1] = 0
        samples = [self._encryptions(both, x) for x in (first, second)]
        assert samples[0].shape == samples[1].shape, "the size of a request depends on its values"
        a, b = samples
        fixed = (a == a[0]).all(0) & (b == b[0]).all(0)
        assert torch.equal(a[0, fixed], b[0, fixed]), "a constant part of the request depends on the data"
        error = ((a.var(0) + b.var(0)) / self.repeats).sqrt()
        # Bytes that hardly vary, such as the top ones of a number with spare bits, are held to a floor.
        score = (a.mean(0) - b.mean(0)).abs()[~fixed] / error[~fixed].clamp_min(0.5 / self.repeats)
        assert score.numel(), "two encryptions of the same input are the same: there is no randomness in them"
        assert float(score.max()) < 8, "the request's values follow the data"

    def _encryptions(self, both: Pair, x: Tensor) -> Tensor:
        rows = []
        for _ in range(self.repeats):
            buffers = both.encrypt(x, both.map("forward")).buffers
            rows.append(torch.cat([t.contiguous().reshape(-1).view(torch.uint8) for _, t in sorted(buffers.items())]))
        return torch.stack(rows).double()

    def test_nothing_private_shows(self, pair: Callable[..., Pair]) -> None:
        """Neither half, nor a request with what is kept for its reply, prints its contents."""
        both = pair(8, 16)
        x = torch.full((1, 16), 0.7310585)
        encrypted = both.encrypt(x, both.map("forward"))
        for text in (repr(both.client), repr(both.worker), repr(both.backend), repr(encrypted)):
            assert "0.73" not in text
            assert "tensor(" not in text

    def test_the_plan_of_traffic_holds(self, pair: Callable[..., Pair]) -> None:
        """Bytes that the backend foretells are the bytes it sends."""
        both = pair(24, 40)
        for direction in DIRECTIONS:
            linear_map = both.map(direction)
            foretold = both.backend.traffic(linear_map, 9)
            if foretold is None or both.backend.states_traffic:
                pytest.skip("this backend foretells no traffic, or that of another one")
            request = both.encrypt(torch.ones(9, linear_map.in_features), linear_map).buffers
            reply = both.evaluate(direction, request)
            assert foretold == (sum(t.nbytes for t in request.values()), sum(t.nbytes for t in reply.values()))

    def test_inputs_of_a_layer(self) -> None:
        """In the whole framework: no tokens, any leading dimensions, other types, and rows that are not finite."""
        torch.manual_seed(0)
        plain = nn.Linear(12, 7)
        model = ciphertune.outsource(nn.Sequential(plain), self.selection, "all")
        try:
            x = torch.randn(2, 3, 12)
            expected = plain(x).detach()
            size = float(expected.square().mean().sqrt())
            assert model(x).shape == expected.shape
            assert float((model(x).detach() - expected).square().mean().sqrt()) <= 0.2 * size
            for kind in (torch.bfloat16, torch.float64):
                assert model(x.to(kind)).dtype == kind
            poisoned = [x.clone().index_put_((torch.tensor(1),), torch.tensor(v)) for v in (math.nan, math.inf)]
            for bad in poisoned:
                y = model(bad).detach()
                assert y[1].isnan().all(), "a row that is not finite gives NaN, as in the clear"
                assert float((y[0] - expected[0]).square().mean().sqrt()) <= 0.2 * size, "and no other row changes"
            assert model(x[:0]).shape == (0, 3, 7), "without tokens nothing is sent, and nothing comes back"
        finally:
            ciphertune.session_of(model).close()

    def test_a_model_trains(self) -> None:
        """In the whole framework: the loss falls, and follows that of the same model at the client."""
        at_client, outsourced = self._losses(None), self._losses(self.selection)
        assert outsourced[-1] < 0.8 * outsourced[0]
        assert outsourced == pytest.approx(at_client, rel=0.1)

    def test_a_model_trains_over_a_wire(self, tmp_path: Path) -> None:
        """A model trains to the same losses with its weights at a worker behind a transport."""
        choice = choose(self.selection)
        with ServedWorker(self._network(), self.wire, tmp_path, weight_bits=choice.backend.weight_bits) as served:
            options = dict(choice.selection.options)
            if not choice.backend.security.encrypted:
                options["allow_insecure"] = "1"
            remote = self._losses(served.selection(choice.selection.backend, **options))
            assert served.service.load.sessions == 0, "the session was left open at the worker"
        assert remote == pytest.approx(self._losses(None), rel=0.1)

    def _network(self) -> nn.Sequential:
        torch.manual_seed(0)
        width = self.width
        return nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))

    def _losses(self, to: str | None) -> list[float]:
        model = self._network()
        x = torch.randn(self.samples, 12)
        target = x[:, :3].argmax(1)
        if to is not None:
            model = ciphertune.outsource(model, to, layers=["2"])
        for parameter in model[2].parameters():
            parameter.requires_grad_(False)
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0)
        curve = []
        try:
            for _ in range(self.steps):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), target)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                curve.append(loss.item())
        finally:
            if to is not None:
                ciphertune.session_of(model).close()
        return curve
