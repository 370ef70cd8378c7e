"""Training arguments of transformers, or a dictionary of them, as settings of ours."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from ciphertune._support.suggestions import closest
from ciphertune.errors import TrainingError

_SCHEDULES = {"constant": "constant", "constant_with_warmup": "constant", "linear": "linear", "cosine": "cosine"}

# What would train otherwise than asked, where it has another value than these.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "bf16": (False, None),
    "deepspeed": (None, ""),
    "fp16": (False, None),
    "fsdp": (None, "", False, []),
    "gradient_checkpointing": (False, None),
    "label_smoothing_factor": (0, None),
    "neftune_noise_alpha": (None,),
    "torch_compile": (False, None),
}
_REFUSED_OF_OPTIMIZER: dict[str, tuple[Any, ...]] = {
    "adam_beta1": (0.9,),
    "adam_beta2": (0.999,),
    "adam_epsilon": (1e-8,),
    "lr_scheduler_kwargs": (None, "", {}),
    "optim": ("adamw_torch", "adamw_torch_fused", "adamw_hf"),
    "optim_args": (None, ""),
}
_READ = (
    "eval_on_start", "eval_steps", "eval_strategy", "evaluation_strategy", "gradient_accumulation_steps",
    "learning_rate", "lr_scheduler_type", "max_grad_norm", "max_steps", "num_train_epochs", "save_total_limit",
    "warmup_ratio", "warmup_steps", "weight_decay",
)  # fmt: skip
# Without transformers at hand; the first four are set by its own code.
_HARMLESS = (
    "deepspeed_plugin", "distributed_state", "fsdp_plugin_args", "mixed_precision", "output_dir", "seed", "use_cpu",
)  # fmt: skip


def settings_of(arguments: Any, *, own_optimizer: bool) -> dict[str, Any]:
    """Attributes of ``TrainingSettings`` that training arguments state.

    Args:
        arguments: a ``transformers.TrainingArguments``, its ``vars``, or a dictionary of some of its attributes.
        own_optimizer: whether the optimizer is made from the settings. An optimizer or a scheduler that is given has
            the learning rate, the weight decay and the schedule already, so that these are not read.

    Returns:
        Attributes by name. What concerns files, logs and the loader that the caller makes (batch sizes, workers, seeds,
        ``output_dir``, ``save_steps``) is not among them.

    Raises:
        TrainingError: an argument that nobody knows, or one that would have to change the training and is not
            supported.
    """
    if isinstance(arguments, Mapping):
        values = dict(arguments)
        _refuse_unknown(values)
    elif isinstance(arguments, type) or not hasattr(arguments, "__dict__"):
        raise TrainingError(
            "training_args must be a transformers.TrainingArguments, its vars(…), or a dictionary of some of its "
            f"attributes, not a {type(arguments).__name__}"
        )
    else:
        values = dict(vars(arguments))
    values = {name: getattr(value, "value", value) for name, value in values.items()}
    refused = {**_REFUSED, **(_REFUSED_OF_OPTIMIZER if own_optimizer else {})}
    for name, allowed in refused.items():
        if name in values and values[name] not in allowed:
            raise TrainingError(
                f"training_args: {name}={values[name]!r} is not supported here"
                + ("; give an optimizer that does so" if name in _REFUSED_OF_OPTIMIZER else "")
            )
    found = _length(values)
    if "gradient_accumulation_steps" in values:
        found["accumulation"] = values["gradient_accumulation_steps"]
    if "max_grad_norm" in values:
        found["max_grad_norm"] = values["max_grad_norm"] or None
    if values.get("save_total_limit") is not None:
        found["keep_checkpoints"] = values["save_total_limit"]
    if values.get("eval_on_start"):
        found["eval_on_start"] = True
    if values.get("eval_strategy", values.get("evaluation_strategy")) == "steps" and values.get("eval_steps"):
        found["eval_every"] = _whole("eval_steps", values["eval_steps"])
    if own_optimizer:
        found |= _optimization(values)
    return found


def _length(values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "num_train_epochs" in values:
        found["epochs"] = _whole("num_train_epochs", values["num_train_epochs"])
    if (values.get("max_steps") or -1) > 0:
        found["steps"] = _whole("max_steps", values["max_steps"])
        found.pop("epochs", None)
    return found


def _optimization(values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {name: values[name] for name in ("learning_rate", "weight_decay") if name in values}
    schedule = values.get("lr_scheduler_type")
    if schedule is not None:
        if schedule not in _SCHEDULES:
            raise TrainingError(
                f"training_args: lr_scheduler_type={schedule!r} is not supported here ({', '.join(_SCHEDULES)} are): "
                "give optimizer and scheduler"
            )
        found["schedule"] = _SCHEDULES[schedule]
    # The plain "constant" has no warming up, whatever is said of it.
    warm = (values.get("warmup_steps") or values.get("warmup_ratio") or 0) if schedule != "constant" else 0
    if warm:
        found["warmup_steps"] = float(warm)
    return found


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or int(value) != value:
        raise TrainingError(f"training_args: {name} must be a whole number, not {value!r}")
    return int(value)


def _refuse_unknown(values: Mapping[str, Any]) -> None:
    """Refuse a key that is no attribute of training arguments: a misspelt one would silently do nothing."""
    known = {*_READ, *_HARMLESS, *_REFUSED, *_REFUSED_OF_OPTIMIZER}
    strange = [name for name in values if not str(name).startswith("_") and name not in known]
    if not strange:
        return
    module = sys.modules.get("transformers")
    if module is None:
        try:
            import transformers as module  # type: ignore[no-redef]
        except ImportError:
            module = None
    # transformers' own, and those of trainers that derive theirs (TRL's SFTConfig).
    kinds = [module.TrainingArguments] if module is not None else []
    while kinds:
        kind = kinds.pop()
        known |= {field.name for field in dataclasses.fields(kind)}
        kinds += kind.__subclasses__()
    for name in strange:
        if name not in known:
            near = closest(str(name), _READ)
            raise TrainingError(f"training_args: no training argument is named {name!r}; {near}")
