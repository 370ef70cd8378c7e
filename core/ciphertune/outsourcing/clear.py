"""Outsourced layers computed in the clear at the client, for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from ciphertune.client.clear import ClearProducts
from ciphertune.client.preparing import HeldCodes
from ciphertune.client.session import Session
from ciphertune.errors import NothingOutsourcedError, OutsourcedWeightError, UnsupportedLayerError
from ciphertune.outsourcing.convert import ModelCodes, sessions_of
from ciphertune.outsourcing.embedding import choose_table
from ciphertune.outsourcing.layers import Candidate, linear_layers
from ciphertune.worker import Worker


@contextlib.contextmanager
def in_the_clear(model: nn.Module, original: nn.Module | None = None) -> Iterator[None]:
    """Compute a model's outsourced layers here and in the clear, within a ``with`` block.

    Nothing is encrypted, sent, counted or shown to plugins meanwhile, on any thread. The session stays open, and what
    it prepared is kept. Results are those of the encrypted products but for the encryption's error: weights are
    rounded as the workers hold them. The layers' weights take 4 bytes each until the block ends.

    Args:
        model: has outsourced layers.
        original: the model before it was outsourced, loaded again, which has their weights. Not needed where they are
            evaluated in this process.

    Raises:
        NothingOutsourcedError: the model has no outsourced layer.
        OutsourcedWeightError: the weights are on other machines, and ``original`` does not have them.
        WeightsError: those of ``original`` are others (when they are used).
    """
    sessions = sessions_of(model)
    if not sessions:
        raise NothingOutsourcedError("the model has no outsourced layer: call ciphertune.outsource(model, to=…) first")
    products = [(session, _products(session, original)) for session in sessions]
    with contextlib.ExitStack() as stack:
        for session, clear in products:
            stack.enter_context(session.computing(clear))
        yield


def _products(session: Session, original: nn.Module | None) -> ClearProducts:
    if isinstance(session.worker, Worker) and original is None:
        held = session.worker.weights
        return ClearProducts(HeldCodes({name: held[name] for name in held}), trusted=True)
    if original is None:
        raise OutsourcedWeightError(
            "the weights of the outsourced layers are on other machines, and this client has none of them, so nothing "
            "can be computed in the clear here. Load the original model too, and name it: "
            "in_the_clear(model, original=…)"
        )
    found = {candidate.name: candidate for candidate in _candidates(original)}
    missing = [layer.name for layer in session.layers if layer.name not in found]
    if missing:
        raise OutsourcedWeightError(f"the original model has no layer {missing[0]!r}, of {len(missing)} that it lacks")
    chosen = [found[layer.name] for layer in session.layers]
    return ClearProducts(ModelCodes(chosen, session.layers[0].weight_bits), trusted=False)


def _candidates(model: nn.Module) -> list[Candidate]:
    linear = linear_layers(model, trial=False)
    try:
        together, table = choose_table(model, linear)
    except (NothingOutsourcedError, UnsupportedLayerError):
        return linear
    return [*table.places, *together]
