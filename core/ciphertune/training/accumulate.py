"""Gradients of several micro-batches, added up in their order whatever order they are computed in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ciphertune.errors import TrainingError
from ciphertune.interleaving.interleaver import Interleaver


def run(
    tasks: Sequence[Callable[[], float]], parameters: Iterable[nn.Parameter], interleaver: Interleaver | None
) -> list[float]:
    """Run tasks that each go backward through a graph of their own.

    Args:
        tasks: one a micro-batch.
        parameters: those that gradients are wanted of. ``grad`` gets the same bits with and without interleaver.
        interleaver: threads to run them on; None for one after the other.

    Returns:
        What they returned, in order.
    """
    if interleaver is None or len(tasks) == 1:
        return [task() for task in tasks]
    wanted = list(parameters)
    # What each task adds to each parameter's gradient: more than once in one pass, under reentrant checkpointing.
    parts: list[dict[int, list[Tensor]]] = [{} for _ in tasks]
    before = [parameter.grad for parameter in wanted]

    def take(parameter: Tensor) -> None:
        # On a GPU this thread is torch's own, so the thread does not tell whose gradient it is.
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


def refuse_hooks(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise ``TrainingError`` where a hook would see a sum of gradients that is not there yet."""
    hooked = [name for name, parameter in parameters.items() if parameter._post_accumulate_grad_hooks]
    if hooked:
        raise TrainingError(
            f"{hooked[0]} has a post-accumulate gradient hook, which would see the gradients of single micro-batches: "
            "train with interleave=1, or use Tensor.register_hook"
        )
