"""Errors of concrete-glwe beside those of the library used with plain 8-bit scaling: the table in docs/concrete.md.

``python benchmarks/glwe_error.py`` prints it; a few minutes.
"""

from __future__ import annotations

import argparse
import json
import math
from tempfile import TemporaryDirectory
from typing import Any

import concrete_ml_extensions as library
import numpy as np
import torch
from torch import Tensor

from ciphertune.client.choice import choose
from ciphertune.weights import describe, group_map, quantize
from ciphertune_concrete.glwe.params import PARAMETERS

TOKENS, OUTPUTS = 32, 16


def plain(x: Tensor, weight: Tensor, keys: Any) -> tuple[Tensor, Tensor]:
    """x Wᵀ with one 8-bit scale for all of x and one for all of W, and the integers' own errors."""
    private, compression, parameters = keys
    scales = [127 / float(t.abs().max()) for t in (x, weight)]
    a, w = ((t.double() * s).round().to(torch.int64).numpy() for t, s in zip((x, weight), scales, strict=True))
    encrypted = library.encrypt_matrix(private, parameters, a.view(np.uint64))
    result = library.cpu_matrix_multiplication(encrypted, w.T.copy().view(np.uint64), compression)
    found = library.decrypt_matrix(result, private, parameters, len(w)).view(np.int64)
    errors = torch.from_numpy(((found - a @ w.T + (1 << 26)) % (1 << 27)) - (1 << 26))
    return torch.from_numpy(a @ w.T + errors.numpy()).double() / (scales[0] * scales[1]), errors


def ours(x: Tensor, weight: Tensor, backend: Any, client: Any, worker: Any) -> tuple[Tensor, Tensor]:
    """x Wᵀ through the backend, and against the weight the worker holds."""
    held = quantize(weight, 8)
    linear_map = group_map([describe("layer", held)], "forward")
    encrypted = client.encrypt(x, linear_map)
    reply = worker.evaluate(worker.prepare(held.codes), "forward", encrypted.buffers)
    y = client.decrypt(reply, encrypted.state, linear_map).double()
    assert held.scale is not None
    return y * held.scale.double(), y - x.double() @ held.codes.double().t()


def inputs(kind: str, features: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(TOKENS, features, generator=generator)
    if kind == "gradients":  # Sizes of tokens over four orders of magnitude.
        x *= torch.logspace(0, -4, TOKENS)[:, None]
    return x


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    parameters = library.MatmulCryptoParameters.deserialize(json.dumps(PARAMETERS))
    keys = (*library.cpu_create_private_key(parameters), parameters)
    with TemporaryDirectory() as folder:
        backend = choose(f"concrete-glwe?keys={folder}").backend
        client = backend.client(torch.device("cpu"))
        worker = type(backend).worker(client.open_fields(), client.evaluation_key(), torch.device("cpu"))
    print("| inputs | K | plain 8-bit | ours | of it the encryption's | integer error, plain: mean abs / max |")
    print("| --- | --- | --- | --- | --- | --- |")
    for kind in ("activations", "gradients"):
        for features in (2, 16, 128, 768):
            generator = torch.Generator().manual_seed(features)
            weight = torch.randn(OUTPUTS, features, generator=generator) / math.sqrt(features)
            x = inputs(kind, features, generator)
            exact = x.double() @ weight.double().t()
            # Per token, so that small tokens count as much as large ones: each is a gradient of its own.
            sizes = exact.norm(dim=1)

            def relative(error: Tensor, sizes: Tensor = sizes) -> float:
                return float((error.norm(dim=1) / sizes).square().mean().sqrt())

            naive, integers = plain(x, weight, keys)
            good, noise = ours(x, weight, backend, client, worker)
            scale = quantize(weight, 8).scale
            assert scale is not None
            row = (relative(naive - exact), relative(good - exact), relative(noise * scale.double()))
            figures = " | ".join(f"{value:.2g}" for value in row)
            absolute = integers.abs().double()
            print(f"| {kind} | {features} | {figures} | {absolute.mean():.0f} / {absolute.max():.0f} |", flush=True)


if __name__ == "__main__":
    main()
