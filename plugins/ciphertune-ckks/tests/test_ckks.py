"""What the conformance suite cannot know: exactness against SEAL, the worst case, hostile bytes, and the wire."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import seal
import torch
from torch import Tensor

from ciphertune import SelectionError
from ciphertune.backend import LinearMap
from ciphertune.errors import ProtocolError, ReplyError
from ciphertune_ckks import CKKSBackend
from ciphertune_ckks.ring import DEGREE, FIELDS, MODULUS, MODULUS_BITS, SLOTS, TOKENS, WIDTH, pack, unpack
from ciphertune_ckks.worker import CKKSWorker

CPU = torch.device("cpu")


def codes(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randint(-127, 128, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def forward(weight: Tensor, norm: float | None = None) -> LinearMap:
    largest = float(weight.double().norm(dim=1).max()) if norm is None else norm
    return LinearMap("layer (forward)", "forward", weight.shape[1], weight.shape[0], largest)


def product(x: Tensor, weight: Tensor) -> Tensor:
    backend = CKKSBackend()
    client = backend.client(CPU)
    worker = CKKSBackend.worker(client.open_fields(), {}, CPU)
    encrypted = client.encrypt(x, forward(weight))
    return client.decrypt(
        worker.evaluate(worker.prepare(weight), "forward", encrypted.buffers), encrypted.state, forward(weight)
    )


def random_residues(features: int, blocks: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, MODULUS, (features, blocks, 2, DEGREE), generator=generator)


def test_parameters_are_those_of_the_standard_as_seal_has_it() -> None:
    (prime,) = seal.CoeffModulus.Create(DEGREE, [MODULUS_BITS])
    assert prime.value() == MODULUS
    assert prime.is_prime()
    assert seal.CoeffModulus.MaxBitCount(DEGREE, seal.sec_level_type.tc192) >= MODULUS_BITS
    assert CKKSBackend().security.bits == 192


def test_a_worker_gives_what_seals_evaluator_gives() -> None:
    parameters = seal.EncryptionParameters(seal.scheme_type.ckks)
    parameters.set_poly_modulus_degree(DEGREE)
    parameters.set_coeff_modulus([seal.Modulus(MODULUS)])
    context = seal.SEALContext(parameters, True, seal.sec_level_type.tc192)
    encoder, evaluator = seal.CKKSEncoder(context), seal.Evaluator(context)
    encryptor = seal.Encryptor(context, seal.KeyGenerator(context).secret_key())

    def residues(ciphertext: seal.Ciphertext) -> Tensor:
        stored = ciphertext.to_string(seal.compr_mode_type.none)
        return torch.from_numpy(np.frombuffer(stored[-2 * DEGREE * 8 :], dtype=np.int64).reshape(1, 2, DEGREE).copy())

    rng = np.random.default_rng(0)
    ciphertexts = [encryptor.encrypt_symmetric(encoder.encode(rng.normal(size=SLOTS) * 1e3, 1.0)) for _ in range(5)]
    weight = codes(3, 5)
    weight[weight == 0] = 1  # SEAL refuses to multiply by zero
    expected = []
    for row in weight.tolist():
        terms = [evaluator.multiply_plain(c, encoder.encode(w)) for c, w in zip(ciphertexts, row, strict=True)]
        expected.append(residues(evaluator.add_many(terms)))
    request = pack(torch.stack([residues(c) for c in ciphertexts]))
    reply = CKKSWorker(CPU).evaluate(weight, "forward", request)
    assert torch.equal(reply["c"], pack(torch.stack(expected))["c"])


def test_products_are_exact_whatever_the_residues() -> None:
    """Float64 carries them: many features, the largest residues and codes, both directions."""
    worker = CKKSWorker(CPU)
    weight = codes(3, 1300)
    weight[0], weight[1] = 127, -128
    residues = random_residues(1300)
    residues[..., :7] = MODULUS - 1
    where = [*range(7), *range(7, DEGREE, 97)]
    for direction, matrix in (("forward", weight), ("backward", weight.t().contiguous())):
        reply = worker.evaluate(worker.prepare(matrix), direction, pack(residues))
        found = unpack(reply, 3, ReplyError, "")[:, 0, :, where].tolist()
        columns = residues[:, 0][..., where].permute(1, 2, 0).tolist()
        for row, of_row in zip(weight.tolist(), found, strict=True):
            for of_half, values in zip(of_row, columns, strict=True):
                for got, column in zip(of_half, values, strict=True):
                    assert got == sum(w * c for w, c in zip(row, column, strict=True)) % MODULUS


@pytest.mark.parametrize("tokens", [SLOTS - 1, SLOTS + 1, TOKENS, 2 * TOKENS + 3])
def test_tokens_fill_both_parts_of_slots_and_several_ciphertexts(tokens: int) -> None:
    weight = codes(2, 3)
    x = torch.randn(tokens, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(product(x, weight), (x.double() @ weight.double().t()).float(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("coefficient", [0, 1, 511, SLOTS, DEGREE - 1])
def test_outputs_that_add_up_in_one_coefficient_do_not_wrap(coefficient: int) -> None:
    """The worst case: every token parallel to the weight, with the signs that make one coefficient largest."""
    # Slot j is the polynomial's value at the root of unity of this exponent (powers of 3).
    exponents = [pow(3, j, 2 * DEGREE) for j in range(SLOTS)]
    angle = np.pi / DEGREE * np.array(exponents, dtype=np.float64) * coefficient
    signs = torch.from_numpy(
        np.concatenate([np.where(np.cos(angle) < 0, -1.0, 1.0), np.where(np.sin(angle) < 0, -1.0, 1.0)])
    )
    weight = codes(1, 16)
    x = (signs[:, None] * weight.double()).float()
    y = product(x, weight)
    expected = (x.double() @ weight.double().t()).float()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("fields", [{}, {"parameters": "other"}, {"parameters": [1]}, {**FIELDS, "secret": b"0"}])
def test_openings_that_are_none(fields: dict[str, object]) -> None:
    with pytest.raises(ProtocolError, match="parameters"):
        CKKSBackend.worker(fields, {}, CPU)


def test_a_worker_takes_no_key_and_only_int8_weights() -> None:
    with pytest.raises(ProtocolError, match="key"):
        CKKSBackend.worker(FIELDS, {"key": torch.zeros(1)}, CPU)
    with pytest.raises(ProtocolError, match="int8"):
        CKKSWorker(CPU).prepare(torch.zeros(2, 2))


def test_options_that_are_none() -> None:
    with pytest.raises(SelectionError, match="weight_bits"):
        CKKSBackend.from_text({"weight_bits": "16"})


def test_residues_beyond_the_modulus_are_refused() -> None:
    residues = random_residues(4)
    residues[3, 0, 1, 5] = MODULUS
    with pytest.raises(ProtocolError, match="below the modulus"):
        CKKSWorker(CPU).evaluate(codes(2, 4), "forward", pack(residues))
    client = CKKSBackend().client(CPU)
    encrypted = client.encrypt(torch.ones(2, 4), forward(codes(4, 4)))
    with pytest.raises(ReplyError, match="below the modulus"):
        client.decrypt(pack(residues), encrypted.state, forward(codes(4, 4)))


@pytest.mark.parametrize(
    "shape", [(3, 1, 2, DEGREE, WIDTH), (4, 0, 2, DEGREE, WIDTH), (4, 1, 3, DEGREE, WIDTH), (4, 1, 2, 1024, WIDTH)]
)
def test_requests_of_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ProtocolError, match="expected"):
        CKKSWorker(CPU).evaluate(codes(2, 4), "forward", {"c": torch.zeros(shape, dtype=torch.uint8)})


def test_hostile_bytes_are_refused_or_decrypt_to_numbers() -> None:
    """Whatever is in a reply of the right size, decryption ends with ``ReplyError`` or with finite numbers."""
    client = CKKSBackend().client(CPU)
    linear_map = forward(codes(3, 4))
    encrypted = client.encrypt(torch.ones(2, 4), linear_map)
    generator = torch.Generator().manual_seed(7)
    shape = (3, 1, 2, DEGREE, WIDTH)
    refused = 0
    for index in range(40):
        c = pack(random_residues(3, seed=index))["c"]
        if index % 2:  # some of it any bytes
            c[..., index * 7 :, :] = torch.randint(0, 256, (*shape[:3], DEGREE - index * 7, WIDTH), generator=generator)
        try:
            assert torch.isfinite(client.decrypt({"c": c}, encrypted.state, linear_map)).all()
        except ReplyError:
            refused += 1
    assert refused == 20
    # What SEAL calls transparent: zeros, which a worker with a weight of zeros answers rightly.
    y = client.decrypt({"c": torch.zeros(shape, dtype=torch.uint8)}, encrypted.state, linear_map)
    assert torch.equal(y, torch.zeros(2, 3))


def test_rows_of_zeros_give_zeros() -> None:
    assert torch.equal(product(torch.ones(2, 4), torch.tensor([[0, 0, 0, 0]], dtype=torch.int8)), torch.zeros(2, 1))


def test_a_closed_client_holds_no_key() -> None:
    client = CKKSBackend().client(CPU)
    client.close()
    client.close()
    assert not [v for v in vars(client).values() if isinstance(v, (seal.Encryptor, seal.Decryptor, seal.SecretKey))]


def test_a_worker_needs_no_cryptographic_library() -> None:
    """Nor does it import the client half."""
    script = """
import sys
sys.modules["seal"] = None
import torch
from ciphertune_ckks import CKKSBackend
worker = CKKSBackend.worker({"parameters": "ckks-2048-37"}, {}, torch.device("cpu"))
request = {"c": torch.zeros(3, 1, 2, 2048, 5, dtype=torch.uint8)}
assert worker.evaluate(torch.ones(2, 3, dtype=torch.int8), "forward", request)["c"].shape == (2, 1, 2, 2048, 5)
assert "ciphertune_ckks.client" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=300)


def test_the_readme_runs() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
