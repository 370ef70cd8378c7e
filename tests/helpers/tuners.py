"""Every tuner of the installed peft on an outsourced model, added before and after it is outsourced."""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from typing import Any, Literal
from unittest import mock

import small
import torch
from torch import Tensor, nn

import ciphertune
from ciphertune.errors import ConfigError, OutsourcedWeightError
from ciphertune.training.tuners import check_tuner, refusal

Order = Literal["before", "after"]

OPTIONS: dict[str, dict[str, Any]] = {
    "LORA": {"r": 2},
    "ADALORA": {"init_r": 3, "target_r": 2, "total_step": 10},
    "ADAMSS": {"num_subspaces": 2, "subspace_rank": 1},
    "ADAPTION_PROMPT": {"adapter_len": 2, "adapter_layers": 1},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "CPT": {"cpt_token_ids": [5, 6], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]},
    "FOURIERFT": {"n_frequency": 8},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "post_attention_layernorm"]},
    "MISS": {"r": 4},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 3, "num_tasks": 1},
    "OFT": {"r": 0, "oft_block_size": 4},
    "PSOFT": {"r": 4},
    "SHIRA": {"r": 2},
    "POLY": {"r": 2, "n_tasks": 1, "n_skills": 1, "n_splits": 1},
    "RANDLORA": {"r": 2},
    "ROAD": {"group_size": 8},
    "SHADOW": {"r": 2},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2], "target_modules": ["embed_tokens"]},
    "UNILORA": {"r": 2, "theta_d_length": 16},
    "VBLORA": {"r": 2, "num_vectors": 8, "vector_length": 8, "topk": 1},
    "WAVEFT": {"n_frequency": 8},
    "XLORA": {},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "LoftQ": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}},
}
"""Kinds of LoRA that a peft configuration asks for."""
TARGETS = ["q_proj", "v_proj", "down_proj"]
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Row:
    """What came of one tuner.

    Attributes:
        tuner: peft's name of it.
        before, after: "works", or what happens, for a tuner added before and after the model is outsourced; "not
            tried" for one that a small Llama does not take in the clear.
        file: whether a run's file may name it.
    """

    tuner: str
    before: str
    after: str
    file: str


def named() -> list[str]:
    """The tuners of the installed peft, as a run's file names them."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING)


def tuners() -> list[str]:
    """The tuners of the installed peft, and kinds of LoRA after a comma."""
    return sorted([*named(), *(f"LORA, {variant}" for variant in VARIANTS)])


def look(tuner: str) -> Row:
    """Add a tuner in both orders, compare both passes with the plain model's, save, and load on the plain model."""
    with warnings.catch_warnings(), mock.patch("peft.tuners.lora.layer.loftq_init", loftq_init):
        warnings.simplefilter("ignore")
        try:
            plain = _adapted(plain_model(), tuner)
            wanted = _trained(plain)
            assert wanted[1]
        except Exception:
            return Row(tuner, "not tried", "not tried", in_a_file(tuner))
        return Row(tuner, _tried(tuner, "before", wanted), _tried(tuner, "after", wanted), in_a_file(tuner))


def in_a_file(tuner: str) -> str:
    """Whether a run's file may name a tuner."""
    if tuner == "LORA":
        return "`[lora]`"
    if (variant := _variant(tuner)) is not None:
        refused = {bundle: _refused(VARIANTS[variant], bundle) for bundle in (False, True)}
        return "no" if refused[False] else "`[lora]`, with the whole model" if refused[True] else "`[lora]`"
    if refusal(tuner, bundle=False) is not None:
        return "no"
    return "yes" if refusal(tuner, bundle=True) is None else "yes, with the whole model"


def loftq_init(weight: Tensor, num_bits: int, reduced_rank: int, num_iter: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """In place of peft's, which asks for bitsandbytes and a GPU: a weight on a grid, and factors of what that lost."""
    assert num_iter == 1
    full = weight.to(dtype=torch.float32)
    step = full.abs().max() / 2 ** (num_bits - 1)
    rounded = (full / step).round() * step
    u, s, v = torch.linalg.svd(full - rounded, full_matrices=False)
    root = s[:reduced_rank].sqrt()
    return rounded.to(weight.dtype), root[:, None] * v[:reduced_rank], u[:, :reduced_rank] * root


def _variant(tuner: str) -> str | None:
    return tuner.partition(", ")[2] or None


def _refused(options: dict[str, Any], bundle: bool) -> bool:
    try:
        check_tuner("LORA", options, "lora", bundle=bundle, classification=False)
    except ConfigError:
        return True
    return False


def plain_model() -> Any:
    """A small Llama."""
    return small.model("LlamaForCausalLM", num_key_value_heads=2)


def _tried(tuner: str, order: Order, wanted: tuple[Tensor, dict[str, Tensor]]) -> str:
    try:
        if order == "before":
            model = ciphertune.outsource(_adapted(plain_model(), tuner), "clear")
        else:
            model = _adapted(ciphertune.outsource(plain_model(), "clear"), tuner)
        logits, gradients = _trained(model)
    except OutsourcedWeightError:
        return "refused"
    except Exception as error:
        return f"peft ends with {type(error).__name__}"
    expected, of_plain = wanted
    if not _close(logits, expected):
        return "deviates"
    if gradients.keys() != of_plain.keys() or not all(_close(gradients[n], of_plain[n]) for n in gradients):
        return "deviates in gradients"
    if ciphertune.share(model).layers < 8:
        return f"works, with {ciphertune.share(model).layers} of 14 layers outsourced"
    return _saved(model, logits)


def _saved(model: Any, logits: Tensor) -> str:
    from peft import PeftModel

    try:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = PeftModel.from_pretrained(plain_model(), folder).eval()
    except Exception as error:
        return f"trains, and cannot be saved: {type(error).__name__}"
    with torch.no_grad():
        again = loaded(input_ids=small.ids(), **_extra(loaded)).logits
    return "works" if _close(again, logits) else "trains, and loads as another"


def _adapted(model: Any, tuner: str) -> Any:
    from peft import get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    variant = _variant(tuner)
    tuner = tuner.partition(", ")[0]
    kind = next(each for each in PEFT_TYPE_TO_CONFIG_MAPPING if each.value == tuner)
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    fields = {field.name for field in dataclasses.fields(cls)}
    options: dict[str, Any] = {"task_type": "CAUSAL_LM"} | OPTIONS.get(tuner, {}) | VARIANTS.get(variant or "", {})
    if "num_virtual_tokens" in fields and tuner != "CPT":
        options.setdefault("num_virtual_tokens", 3)
    elif "target_modules" in fields and tuner not in ("ADAPTION_PROMPT", "XLORA"):
        options.setdefault("target_modules", TARGETS)
    torch.manual_seed(7)
    adapted = get_peft_model(model, cls(**{k: v for k, v in options.items() if k in fields})).eval()
    generator = torch.Generator().manual_seed(5)
    for parameter in adapted.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data + torch.randn(parameter.shape, generator=generator) * 0.02
    return adapted


def _trained(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    result = model(input_ids=small.ids(), labels=small.ids(), **_extra(model))
    result.loss.backward()
    return result.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _extra(model: Any) -> dict[str, Tensor]:
    """What some tuners are to be told with each batch."""
    kinds = {config.peft_type.value for config in model.peft_config.values()}
    return {"task_ids": torch.zeros(2, dtype=torch.int64)} if kinds & {"POLY", "MULTITASK_PROMPT_TUNING"} else {}


def _close(got: Tensor, wanted: Tensor) -> bool:
    return got.shape == wanted.shape and bool(
        (got - wanted).double().norm() <= TOLERANCE * max(float(wanted.double().norm()), 1e-7)
    )
