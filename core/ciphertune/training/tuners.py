"""Tuners of peft by name, with peft's own options: what can be trained here, checked before a model is loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import types
import typing
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn

from ciphertune._support.optional_imports import import_optional
from ciphertune._support.suggestions import closest
from ciphertune.errors import ConfigError
from ciphertune.training.targets import ALL_LINEAR, all_linear, check_targets, usual

EXTRA = 'pip install "ciphertune[demo]"'
_IN_EACH_PASS = ("GLORA", "HIRA", "HRA", "PEANUT", "SHIRA", "SUPERTUNING")
_AT_THE_START = ("ADAMSS", "DEFT", "DELORA", "FROD", "OSF", "PSOFT", "TINYLORA")
_MULTIPLIES = "it computes with the weights of layers in each pass, and workers have these"
_READS_FIRST = (
    "it reads the weights of layers when it is made, and a bundle's client has none: train from the whole model"
)
_TASK_NUMBERS = "it needs the number of a task with each row, which no file of data gives here"
_OTHERS = {
    "POLY": _TASK_NUMBERS,
    "MULTITASK_PROMPT_TUNING": _TASK_NUMBERS,
    "CPT": "its prompt holds examples as numbers of tokens with masks for each batch: make it in Python",
    "XLORA": "it mixes several adapters that were trained before: make it in Python",
}
_FOR_LANGUAGE_MODELS = ("ADAPTION_PROMPT", "CARTRIDGE", "PREFIX_TUNING")
_OWN_TARGETS = ("IA3", "LN_TUNING")
"""Tuners for which linear layers of any kind will not do: peft says which where a file does not."""
_OF_THE_RUN = (
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"),
    *("runtime_config", "task_type"),
)
_PLAIN_INITS = (True, False, "gaussian", "orthogonal")
_INITS_BY_THE_WEIGHT = ("olora", "pissa", "mica")


def tuner_name(text: str) -> str:
    """Peft's name of a tuner, however it is written: ``prefix-tuning`` is ``PREFIX_TUNING``. Raises ``ConfigError``."""
    name = text.strip().upper().replace("-", "_").replace(" ", "_")
    known = _configs()
    if name not in known:
        near = closest(name.lower(), [each.lower() for each in known])
        raise ConfigError(f"tuner.name: the installed peft has no tuner {text!r}; {near}")
    return name


def refusal(tuner: str, *, bundle: bool, classification: bool = False) -> str | None:
    """Why a run cannot train a tuner, None if it can.

    Args:
        tuner: peft's name of it.
        bundle: whether the client has no weight of the outsourced layers.
        classification: whether texts are classified; else a language model is trained.
    """
    if tuner in _IN_EACH_PASS:
        return _MULTIPLIES
    if tuner in _OTHERS:
        return _OTHERS[tuner]
    if classification and tuner in _FOR_LANGUAGE_MODELS:
        return "it is for language models"
    if bundle and tuner in _AT_THE_START:
        return _READS_FIRST
    if bundle and tuner == "ADAPTION_PROMPT":
        return "it needs parameters in each attention layer, and a bundle's client has none: train from the whole model"
    return None


def learns_prompts(tuner: str) -> bool:
    """Whether a tuner trains a prompt in front of the tokens, and nothing within the layers."""
    peft = import_optional("peft", EXTRA)
    config = _configs().get(tuner)
    return config is not None and issubclass(config, peft.config.PromptLearningConfig)


def check_tuner(tuner: str, options: Mapping[str, Any], place: str, *, bundle: bool, classification: bool) -> None:
    """Check a tuner and its options; no model is needed.

    Args:
        tuner: peft's name of it.
        options: for its configuration, by peft's names.
        place: of the options in a file.
        bundle: whether the client has no weight of the outsourced layers.
        classification: whether texts are classified.

    Raises:
        ConfigError: the tuner cannot be trained here, an option is unknown, or a value cannot be one of its type.
    """
    why = refusal(tuner, bundle=bundle, classification=classification)
    if why is not None:
        raise ConfigError(f"{place.partition('.')[0]}: {tuner} cannot be trained here: {why}")
    cls = _configs()[tuner]
    hints = _hints(cls)
    fields = {field.name for field in dataclasses.fields(cls) if field.init} - set(_OF_THE_RUN)
    for name, value in options.items():
        if name in _OF_THE_RUN:
            raise ConfigError(f"{place}.{name} is set by the run: leave it out")
        if name not in fields:
            raise ConfigError(f"{place}: {tuner} has no option {name!r}; {closest(name, fields)}")
        if name != "lora_alpha" and not _fits(value, hints.get(name, Any)):
            raise ConfigError(f"{place}.{name} cannot be {value!r}: peft takes {_told(hints[name])}")
    if "num_virtual_tokens" in fields and tuner != "CARTRIDGE" and "num_virtual_tokens" not in options:
        raise ConfigError(f"{place}.num_virtual_tokens is missing: the number of tokens in front of the text")
    if options.get("use_dora"):
        raise ConfigError(f"{place}.use_dora: DoRA cannot be trained here: {_MULTIPLIES}")
    _check_init(options.get("init_lora_weights", True), place, bundle)
    if learns_prompts(tuner):
        options = {**options, "task_type": "SEQ_CLS" if classification else "CAUSAL_LM"}
    make_config(tuner, options, place, None)


def make_config(tuner: str, options: Mapping[str, Any], place: str, steps: int | None) -> Any:
    """Peft's configuration of a tuner; ``steps`` are those of the run, None where they are not known yet.

    Raises:
        ConfigError: peft refuses it.
    """
    options = dict(options)
    if tuner == "ADALORA":
        if options.get("target_r", 8) >= options.get("init_r", 12):
            raise ConfigError(f"{place}: target_r must be below init_r, the rank that AdaLoRA starts from")
        # Longer than any run where its length is not known yet.
        options.setdefault("total_step", steps or 1 << 40)
    with peft_errors(place):
        return _configs()[tuner](**options)


def add_tuner(
    model: nn.Module,
    tuner: str,
    options: Mapping[str, Any],
    *,
    seed: int,
    place: str = "tuner.options",
    steps: int | None = None,
) -> nn.Module:
    """Add a tuner of peft to a model, initialised from a seed.

    Args:
        model: in the clear or outsourced.
        tuner: peft's name of it.
        options: for its configuration, by peft's names. ``target_modules`` may be names, a pattern that peft takes, or
            ``all-linear``; if not given, they are those that peft has for the tuner and the architecture, and all
            linear layers where it has none.
        seed: of the initial values.
        place: of the options in a file, for errors.
        steps: optimizer steps of the run, which AdaLoRA divides its ranks in.

    Raises:
        ConfigError: a name in ``target_modules`` is of no layer that could have an adapter, or peft refuses.
    """
    peft = import_optional("peft", EXTRA)
    options = {name: value for name, value in options.items() if value is not None}
    if _takes_targets(tuner):
        targets = options.get("target_modules")
        if targets is None:
            targets = usual(model, _targets_by_model(tuner))
        if targets == ALL_LINEAR:
            targets = all_linear(model)
        if not isinstance(targets, str):
            check_targets(model, targets, f"{place}.target_modules")
        options["target_modules"] = targets
    config = make_config(tuner, options, place, steps)
    torch.manual_seed(seed)
    with peft_errors(place):
        adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


@contextlib.contextmanager
def peft_errors(what: str) -> Iterator[None]:
    """Errors of peft as ``ConfigError``, which begins with ``what``; without warnings about what peft does itself."""
    with warnings.catch_warnings():
        # peft asks transformers for a property under a name that transformers is about to drop.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        # It sets this itself for layers that store their weight the other way round.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to", category=UserWarning)
        # AdaLoRA's are names of parameters, which peft 0.21 looks for among modules, and applies all the same.
        warnings.filterwarnings("ignore", message="The following rank_pattern keys", category=RuntimeWarning)
        try:
            yield
        except (ValueError, RuntimeError, TypeError, KeyError, AttributeError, UserWarning, OSError) as error:
            text = " ".join(str(error).split())
            raise ConfigError(f"{what}: {text[:400]}") from error


def _configs() -> dict[str, type[Any]]:
    import_optional("peft", EXTRA)
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {kind.value: cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def _targets_by_model(tuner: str) -> dict[str, Any]:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    cls = next((cls for kind, cls in PEFT_TYPE_TO_TUNER_MAPPING.items() if kind.value == tuner), None)
    found: dict[str, Any] = getattr(cls, "target_module_mapping", None) or {}
    return found


def _takes_targets(tuner: str) -> bool:
    """Whether a tuner changes linear layers, of which any will do."""
    names = {field.name for field in dataclasses.fields(_configs()[tuner])}
    return (
        "target_modules" in names
        and tuner not in _OWN_TARGETS
        and not learns_prompts(tuner)
        and bool(_targets_by_model(tuner))
    )


def _check_init(init: Any, place: str, bundle: bool) -> None:
    if init in _PLAIN_INITS:
        return
    by_weight = str(init).startswith(_INITS_BY_THE_WEIGHT)
    if by_weight and bundle:
        raise ConfigError(f"{place}.init_lora_weights = {init!r}: {_READS_FIRST}")
    if not by_weight:
        raise ConfigError(
            f"{place}.init_lora_weights = {init!r} needs more than a file can give: true, false, 'gaussian', "
            "'orthogonal', 'olora' and 'pissa' can be asked for"
        )


def _hints(cls: type[Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except Exception:  # of names that only type checkers see
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from a file may be of a type, as far as that can be told."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in arguments if each is not type(None))
    if origin is Literal:
        return value in arguments or isinstance(value, str)  # some are patterns
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str)
    if (origin or hint) in (list, tuple, set):
        return isinstance(value, list | tuple)
    if (origin or hint) is dict:
        return isinstance(value, Mapping)
    return not dataclasses.is_dataclass(hint)


def _told(hint: Any) -> str:
    text = getattr(hint, "__name__", None) if typing.get_origin(hint) is None else None
    return (text or str(hint)).replace("typing.", "")
