"""Gradients of an optimizer step: those of its micro-batches, added in their order."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ciphertune.errors import NonFiniteLossError, TrainingError
from ciphertune.interleaving.interleaver import Interleaver
from ciphertune.training.frozen import FrozenCache
from ciphertune.training.losses import Loss, batch_loss
from ciphertune.training.optimization import trainable_parameters


def accumulate_gradients(
    model: nn.Module,
    micro_batches: Sequence[Any],
    loss_fn: Loss | None,
    *,
    where: str,
    interleaver: Interleaver | None = None,
    frozen: FrozenCache | None = None,
) -> float:
    """Add the gradients of the micro-batches' mean loss to the trainable parameters.

    Args:
        model: on the device that the micro-batches are to be moved to.
        micro_batches: each with the same weight in the mean.
        loss_fn: as for ``batch_loss``.
        where: the step, for error messages.
        interleaver: threads to compute the micro-batches on; None for one after the other.
        frozen: keeps what frozen blocks give; None for nothing that does.

    Returns:
        The mean loss.

    Raises:
        NonFiniteLossError: a loss is NaN or infinite.
        TrainingError: a batch has the wrong form, or its loss depends on no trainable parameter.
    """
    count = len(micro_batches)
    tasks = [
        functools.partial(_backward, model, batch, loss_fn, count, f"{where}: the loss of micro-batch {number}", frozen)
        for number, batch in enumerate(micro_batches, 1)
    ]
    total = 0.0
    for loss in run_backward_passes(tasks, trainable_parameters(model).values(), interleaver):
        total += loss
    return total / count


def run_backward_passes(
    tasks: Sequence[Callable[[], float]], parameters: Iterable[nn.Parameter], interleaver: Interleaver | None
) -> list[float]:
    """Run tasks that each go backward through a graph of their own.

    Args:
        tasks: one for each micro-batch.
        parameters: those whose ``grad`` is wanted. It gets the same bits with and without an interleaver, for the
            gradients are added in the order of the tasks.
        interleaver: threads to run the tasks on; None for one after the other.

    Returns:
        The results of the tasks, in order.
    """
    if interleaver is None or len(tasks) == 1:
        return [task() for task in tasks]
    wanted = list(parameters)
    # What each task adds to each parameter's gradient: more than once in one pass, under reentrant checkpointing.
    parts: list[dict[int, list[Tensor]]] = [{} for _ in tasks]
    before = [parameter.grad for parameter in wanted]

    def take(parameter: Tensor) -> None:
        # On a GPU this is a thread of torch, so the task is looked up at the interleaver.
        assert interleaver.current is not None
        assert parameter.grad is not None
        parts[interleaver.current].setdefault(id(parameter), []).append(parameter.grad)
        parameter.grad = None

    hooks = [parameter.register_post_accumulate_grad_hook(take) for parameter in wanted]  # type: ignore[no-untyped-call]
    try:
        for parameter in wanted:
            parameter.grad = None
        results = interleaver.run(tasks)
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, grad in zip(wanted, before, strict=True):
            parameter.grad = grad
    with torch.no_grad():
        for parameter in wanted:
            for part in (part for of_task in parts for part in of_task.get(id(parameter), ())):
                parameter.grad = part if parameter.grad is None else parameter.grad.add_(part)
    return results


def refuse_gradient_hooks(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise ``TrainingError`` where a hook would see the gradient of one micro-batch in place of the sum."""
    hooked = [name for name, parameter in parameters.items() if parameter._post_accumulate_grad_hooks]
    if hooked:
        raise TrainingError(
            f"{hooked[0]} has a post-accumulate gradient hook, which would see the gradients of single micro-batches: "
            "train with interleave=1, or use Tensor.register_hook"
        )


def _backward(
    model: nn.Module, batch: Any, loss_fn: Loss | None, count: int, what: str, frozen: FrozenCache | None
) -> float:
    """Go backward from the loss of one of ``count`` micro-batches; returns the loss."""
    with contextlib.nullcontext() if frozen is None else frozen.going_on("training", batch):
        result = batch_loss(model, batch, loss_fn)
    loss = float(result.loss.detach())
    if not math.isfinite(loss):
        why = "every label of it is -100" if result.weight == 0 else "lower the learning rate or look at it"
        raise NonFiniteLossError(f"{what} of {count} is {loss}; no weight was touched. About that batch: {why}")
    if not result.loss.requires_grad:
        raise TrainingError(
            f"{what} of {count} does not depend on any trainable parameter. Are the adapters switched off, "
            "or is the loss computed under no_grad or from detached outputs? With gradient checkpointing, "
            "call model.enable_input_require_grads() first"
        )
    (result.loss / count).backward()  # type: ignore[no-untyped-call]
    return loss
