"""Sizes of a model's activations and gradients by channel, from public data."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ciphertune._support.own_modes import own_modes
from ciphertune.backend import Backend
from ciphertune.errors import ConfigError
from ciphertune.outsourcing.layers import linear_layers

_ROW = 256
_ROWS = 2
"""Tokens of a row of text, and rows."""

OFF = "off"
"""What stands for no calibration where a file with text may be named."""


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Mean squares by channel of what a model's linear layers get, over public data.

    Attributes:
        inputs: of each layer's input, (K,) float64, by the layer's name; of experts' layers, those that tokens are
            multiplied with.
        outputs: of the gradient of its output, (N,) float64. Empty for a model whose loss is not known.
    """

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]


class _Squares:
    """A sum of squares by channel."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, values: Tensor) -> None:
        flat = values.detach().reshape(-1, values.shape[-1]).to(torch.float32)
        sums = flat.square().sum(0, dtype=torch.float64).cpu()
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums
        self._counts[name] = self._counts.get(name, 0) + len(flat)

    def means(self) -> dict[str, Tensor]:
        return {name: sums / max(self._counts[name], 1) for name, sums in self._sums.items()}


@own_modes()
def calibrate(model: nn.Module, batches: Iterable[Any]) -> Calibration:
    """Measure which channels of a model's linear layers have outliers, in the clear and at the client.

    ``outsource(…, calibration=)`` keeps up to 8 of them a product at the client. The model is called as it is, in
    evaluation mode, and is not changed. Gradients are measured where the loss is known: where the result of a call has
    a ``loss`` or, for token ids, ``logits`` of every token.

    Args:
        model: with its weights, without adapters.
        batches: what the model is called with: mappings of keyword arguments, tuples, or tensors. **Public data**, as
            ``public_batches`` makes it: what is kept follows from it, and must not tell of private data. For the same
            reason a model that was trained on private data is calibrated as it was before.

    Raises:
        ConfigError: the model has adapters, or there is no batch.
    """
    if hasattr(model, "peft_config"):
        raise ConfigError("the model has adapters, which private data may have shaped: calibrate it before adding them")
    inputs, outputs = _Squares(), _Squares()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    count = 0
    with _as_it_is(model), _watched(model, inputs, outputs), torch.enable_grad():
        for batch in batches:
            count += 1
            on_device = _moved(batch, device)
            loss = _loss(_call(model, on_device), on_device)
            if loss is not None and loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
    if count == 0:
        raise ConfigError("there is nothing to calibrate with: give at least one batch")
    return Calibration(inputs.means(), outputs.means())


def public_batches(tokenizer: Any, text: str | os.PathLike[str] | None = None) -> list[dict[str, Tensor]]:
    """Token ids to calibrate a language model or an encoder with.

    Args:
        tokenizer: of the model.
        text: a file with public text, UTF-8; the Python language reference if not given.

    Returns:
        Up to two batches of one row each, of at most 256 tokens.

    Raises:
        ConfigError: the file cannot be read, or is empty.
    """
    if text is None:
        from pydoc_data.topics import topics

        content = "\n\n".join(topics[name] for name in sorted(topics))
    else:
        try:
            content = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise ConfigError(f"cannot read {text} to calibrate with: {reason}") from error
    # A token stands for fewer characters than this in any text that tokenizers are made for.
    sample = content[: 16 * _ROW * _ROWS]
    most = getattr(tokenizer, "model_max_length", _ROW)
    row = max(1, min(_ROW, most if isinstance(most, int) else _ROW))
    ids: list[int] = tokenizer(sample, add_special_tokens=False, verbose=False)["input_ids"][: row * _ROWS]
    if not ids:
        raise ConfigError(f"{text or 'the language reference'} gives no tokens to calibrate with")
    rows = [torch.tensor([ids[at : at + row]]) for at in range(0, len(ids), row)]
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in rows]


def calibration_of(
    model: nn.Module, tokenizer: Any, text: str | os.PathLike[str] | None
) -> tuple[Calibration | None, str]:
    """Calibrate a model as a command or a configuration asks for it.

    Args:
        model: with its weights.
        tokenizer: of the model, None if it has none.
        text: as for ``public_batches``, or ``OFF``.

    Returns:
        The calibration, or None and why there is none. Text that was not asked for and does not suit is such a reason.

    Raises:
        ConfigError: the model cannot be calibrated with the text that was asked for.
    """
    if text == OFF:
        return None, "calibration is off"
    if tokenizer is None:
        if text is not None:
            raise ConfigError(f"the model has no tokenizer, so it cannot be calibrated with {text}")
        return None, "the model has no tokenizer that public text could be read with"
    try:
        return calibrate(model, public_batches(tokenizer, text)), ""
    except ConfigError as error:
        if text is not None:
            raise
        return None, str(error)
    except Exception as error:
        # The model's own code, which may want more than token ids.
        why = f"a call of the model with token ids ended with {type(error).__name__}: {error}"
        if text is not None:
            raise ConfigError(f"the model cannot be calibrated with {text}: {why}") from error
        return None, why


def calibration_under(
    backend: Backend,
    model: nn.Module,
    tokenizer: Any,
    text: str | os.PathLike[str] | None,
    progress: Callable[[str], None],
) -> Calibration | None:
    """As ``calibration_of``, for a backend; ``progress`` is told why there is none.

    Nothing is told of a backend with float32 weights, which gains nothing by it.
    """
    if backend.weight_bits is None:
        return None
    found, why = calibration_of(model, tokenizer, text)
    if why:
        progress(f"No channels with outliers are kept at the client: {why}")
    return found


@contextlib.contextmanager
def _as_it_is(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, with no gradient of a parameter."""
    training = [module for module in model.modules() if module.training]
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


@contextlib.contextmanager
def _watched(model: nn.Module, inputs: _Squares, outputs: _Squares) -> Iterator[None]:
    """Have what linear layers get, and the gradients of what they give, added up."""
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def forward(module: nn.Module, args: Any, output: Any) -> None:
            if not args or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
                return
            inputs.add(name, args[0])
            if not output.requires_grad:
                # No parameter asks for gradients: they begin here.
                output.requires_grad_()
            output.register_hook(lambda gradient: outputs.add(name, gradient))  # type: ignore[no-untyped-call]

        handles.append(module.register_forward_hook(forward))

    def watch_experts(names: list[str], module: nn.Module) -> None:
        """Every token goes to every expert, whatever routing chooses."""

        def forward(module: nn.Module, args: Any) -> None:
            for name in names if args and isinstance(args[0], Tensor) else ():
                inputs.add(name, args[0])

        handles.append(module.register_forward_pre_hook(forward))

    experts: dict[int, tuple[nn.Module, list[str]]] = {}
    try:
        for candidate in linear_layers(model, trial=False):
            if candidate.part is None:
                watch(candidate.name, candidate.module)
            elif candidate.obstacle is None and candidate.part.side == "inputs":
                experts.setdefault(id(candidate.module), (candidate.module, []))[1].append(candidate.name)
        for module, names in experts.values():
            watch_experts(names, module)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: _moved(value, device) for name, value in batch.items()}
    return tuple(_moved(value, device) for value in batch) if isinstance(batch, (tuple, list)) else batch


def _call(model: nn.Module, batch: Any) -> Any:
    if not isinstance(batch, Mapping):
        return model(*batch) if isinstance(batch, tuple) else model(batch)
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) and "input_ids" in batch:
        batch = {"decoder_input_ids": batch["input_ids"], **batch}
    named = inspect.signature(model.forward).parameters
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in named.values()):
        return model(**batch)
    return model(**{name: value for name, value in batch.items() if name in named})


def _loss(result: Any, batch: Any) -> Tensor | None:
    """The loss of a result; for a language model that of the next token. None where it is not known."""
    loss = getattr(result, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    logits = getattr(result, "logits", None)
    if not isinstance(ids, Tensor) or not isinstance(logits, Tensor) or logits.shape[:-1] != ids.shape:
        return None
    if ids.shape[1] < 2 or int(ids.max()) >= logits.shape[-1]:
        return None
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
