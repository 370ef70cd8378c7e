"""Metrics of a training run by step."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class History:
    """Metrics of a run; those of a resumed run include the run that it resumes.

    Attributes:
        steps: one entry per optimizer step: ``step`` and ``epoch`` (both from 1), ``loss`` (mean over the step's
            micro-batches), ``learning_rate`` (of the first parameter group), ``grad_norm`` (before clipping),
            ``seconds``, and ``tokens`` read or, for batches without ``input_ids``, ``samples``.
        evaluations: one entry per evaluation: ``step``, ``eval_loss``, for language models ``perplexity``, and what
            ``metric`` and ``eval_metric_fn`` give.
        gradient_norms: with the setting ``gradient_norms``, for each trainable parameter the Euclidean norm of its
            gradient (before clipping) in each step since it was set; NaN where it had none.
    """

    steps: list[dict[str, float]] = dataclasses.field(default_factory=list)
    evaluations: list[dict[str, float]] = dataclasses.field(default_factory=list)
    gradient_norms: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    @property
    def losses(self) -> list[float]:
        """The loss of every step."""
        return [entry["loss"] for entry in self.steps]
