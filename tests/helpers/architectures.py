"""Small models of every architecture that the installed transformers has, outsourced and held against themselves."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import json
import math
import re
import signal
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import recipes
import torch
from torch import Tensor, nn

import ciphertune
from ciphertune.errors import CipherTuneError
from ciphertune.outsourcing.layers import linear_layers
from ciphertune.outsourcing.trial import inputs_for

Verdict = Literal["matches", "refused", "deviates", "fails", "not built"]

FACTORS = (16, 8, 32, 4, 1)
"""What features are divided by; heads keep their number, so that sizes go on fitting each other."""
MOST_WEIGHTS = 120_000_000
SECONDS = 60
TOLERANCE = 1e-3
"""Of relative errors, of models in float32 whose products are computed in float32 in another order."""

_FEATURES = re.compile(
    r"hidden|d_model|d_ff|d_kv|d_inner|embd|embed|_dim$|^dim$|inner|ffn|intermediate|width|rank|projection|head_size|"
    r"mamba_d|state_size|dim_|expand_size|kv_channels"
)
_NO_FEATURES = re.compile(r"layers|act|heads|factor|ratio|position|num_|drop|type|scale|_id$|patch|image|bias|groups")
_LAYERS = re.compile(r"^(?!.*(feat|conv|pos_emb))((n|num)_?(\w+_)?(layers?|blocks)|depth|\w+_layers|n_layer)$")
_STAGES = ("out_features", "out_indices", "_out_features", "_out_indices", "stage_names")
_EXPERTS = re.compile(r"^(n_routed|num|num_local|moe_num|moe_n_routed|num_routed|n)_experts$")
_HEADS = (("num_attention_heads", "hidden_size"), ("num_heads", "hidden_size"), ("num_heads", "embed_dim"))

_MISSING: dict[str, dict[str, Any]] = {"kv_n_heads": {"rope_theta": 1e4, "clip_qkv": 8}}
"""What configurations with some key lack that their models ask for."""


@dataclasses.dataclass(frozen=True)
class Found:
    """What came of one architecture.

    Attributes:
        architecture: model type of its configuration.
        model: name of the class.
        verdict: ``not built`` where no small configuration computes in the clear with inputs made for it.
        forward, backward: relative errors against the plain model, the largest over outputs and over parameters.
        share: of the weights of layers and experts that are outsourced.
        stays: layers that stay and why, in short.
        detail: of an error.
    """

    architecture: str
    model: str
    verdict: Verdict
    forward: float | None = None
    backward: float | None = None
    share: float | None = None
    stays: str = ""
    detail: str = ""


def architectures() -> dict[str, str]:
    """Model types and the name of one class of each: with a head for language where there is one."""
    from transformers.models.auto import modeling_auto as auto

    found: dict[str, str] = {}
    for mapping in (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_MAPPING_NAMES,
    ):
        for kind, name in mapping.items():
            found.setdefault(kind, name if isinstance(name, str) else name[0])
    return dict(sorted(found.items()))


def look(architecture: str, name: str) -> Found:
    """Build a small model, outsource it, and compare both passes."""
    try:
        with _limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = _smallest(architecture, name)
    except Exception as error:
        return Found(architecture, name, "not built", detail=_short(error))
    model, inputs, wanted, gradients = made
    try:
        with _limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _compared(architecture, name, model, inputs, wanted, gradients)
    except CipherTuneError as error:
        return Found(architecture, name, "refused", detail=_short(error))
    except Exception as error:
        return Found(architecture, name, "fails", detail=_short(error))


def _compared(
    architecture: str, name: str, model: nn.Module, inputs: Any, wanted: list[Tensor], gradients: dict[str, Tensor]
) -> Found:
    chosen = linear_layers(model)
    whole = sum(each.weight().numel() for each in chosen)
    names = {each.name for each in chosen if each.obstacle is None and each.stays is None}
    stays: dict[str, list[str]] = {}
    for each in chosen:
        if each.name not in names:
            stays.setdefault(each.obstacle or str(each.stays), []).append(each.name)
    rounded = copy.deepcopy(model)
    ciphertune.outsource(model, "clear")
    got, own = run(model, inputs)
    if len(got) != len(wanted):
        return Found(architecture, name, "deviates", detail=f"{len(got)} outputs, and {len(wanted)} in the clear")
    forward, backward = _errors(got, own, wanted, gradients)
    # Some small models are ill-conditioned: weights that are rounded once more change their results as much.
    ahead, back = TOLERANCE, 10 * TOLERANCE
    if forward > ahead or backward > back:
        of_forward, of_backward = _rounding(rounded, inputs, wanted, gradients)
        ahead, back = max(ahead, 3 * of_forward), max(back, 3 * of_backward)
    missing = [each for each in gradients if each not in own and each in dict(model.named_parameters())]
    same = forward <= ahead and backward <= back and not missing
    return Found(
        architecture,
        name,
        "matches" if same else "deviates",
        forward,
        backward,
        ciphertune.share(model).outsourced / max(whole, 1),
        "; ".join(f"{len(of)} as {of[0]} ({why})" for why, of in stays.items()),
        f"no gradient of {missing[0]}" if missing else "",
    )


def _errors(
    got: list[Tensor], own: dict[str, Tensor], wanted: list[Tensor], gradients: dict[str, Tensor]
) -> tuple[float, float]:
    forward = max((_error(a, b) for a, b in zip(got, wanted, strict=True)), default=0.0)
    # Gradients that are zero but for rounding, as those of keys' biases, have errors of any size.
    least = 1e-4 * max((float(each.double().norm()) for each in gradients.values()), default=0.0)
    return forward, max((_error(own[each], gradients[each], least) for each in own if each in gradients), default=0.0)


def _rounding(model: nn.Module, inputs: Any, wanted: list[Tensor], gradients: dict[str, Tensor]) -> tuple[float, float]:
    """Errors of the plain model with weights that differ in their last bit."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 2.0**-24 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return _errors(*run(model, inputs), wanted, gradients)


def run(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The floating outputs of a model, and the gradients of its parameters of a loss of all of them."""
    torch.manual_seed(0)
    taken = inspect.signature(model.forward).parameters
    asked: dict[str, Any] = {"use_cache": False} if "use_cache" in taken else {}
    # What a model masks is infinite, and tokenizers of sound give codes alone.
    # Some models write into their inputs.
    every = list(_tensors(model(**copy.deepcopy(inputs), **asked)))
    outputs = [each for each in every if each.is_floating_point()] or [each.float() for each in every]
    outputs = [each.masked_fill(each.isinf(), 0) for each in outputs]
    # A sum with weights: that of squares after a norm hardly has a gradient.
    generator = torch.Generator().manual_seed(1)
    parts = [(each.float() * torch.randn(each.shape, generator=generator)).mean() for each in outputs]
    loss = sum((each for each in parts if each.requires_grad), torch.zeros(()))
    model.zero_grad()
    if loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]
    return [each.detach() for each in outputs], {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def _smallest(architecture: str, name: str) -> tuple[nn.Module, Any, list[Tensor], dict[str, Tensor]]:
    import transformers

    recipe = recipes.RECIPES.get(architecture, recipes.PLAIN)
    cls = getattr(transformers, recipe.model or name)
    factors = (recipe.factor,) if recipe.factor is not None else FACTORS
    error: Exception | None = None
    for factor, guessed in [(factor, guessed) for guessed in (False, True) for factor in factors]:
        try:
            config = small_config(cls.config_class, factor, recipe)
            if guessed:
                _guess(config)
            with torch.device("meta"):
                weights = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
            if weights > MOST_WEIGHTS:
                raise ValueError(f"{weights:,} weights at least")
            torch.manual_seed(0)
            model = cls(config).train(recipe.train)
            _even(model, recipe.drawn)
            # Of a copy: some models keep tensors of one call for the next.
            inputs, wanted, gradients = _tried(copy.deepcopy(model), recipe)
            if not any(bool(each.any()) for each in wanted) or any(bool(each.isnan().any()) for each in wanted):
                raise ValueError("no finite output")
            return model, inputs, wanted, gradients
        except (TimeoutError, ImportError):
            raise
        except Exception as problem:
            error = error or problem
            if "required positional argument" in str(problem) or "unexpected keyword argument" in str(problem):
                break
    assert error is not None
    raise error


def _tried(model: nn.Module, recipe: recipes.Recipe) -> tuple[Any, list[Tensor], dict[str, Tensor]]:
    """Inputs that a model takes, its outputs and gradients."""
    if recipe.inputs is not None:
        made = recipe.inputs(model.config)
        return made, *run(model, made)
    try:
        inputs = inputs_for(model, torch.device("cpu"))
        return inputs, *run(model, inputs)
    except TimeoutError:
        raise
    except Exception:
        inputs = inputs_for(model, torch.device("cpu"), everything=True)
        return inputs, *run(model, inputs)


def _guess(config: Any) -> None:
    """Set what a configuration leaves to its model: the size of heads, and how rotary angles are shared among axes."""
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))):
        heads, hidden = getattr(part, "num_attention_heads", None), getattr(part, "hidden_size", None)
        if not isinstance(heads, int) or not isinstance(hidden, int):
            continue
        size = getattr(part, "head_dim", None) or hidden // heads
        if hasattr(part, "head_dim"):
            part.head_dim = size
        ropes = getattr(part, "rope_parameters", None)
        if isinstance(ropes, dict) and "rope_type" in ropes:
            half = int(size * ropes.get("partial_rotary_factor", 1.0)) // 2
            ropes["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]


def small_config(cls: Any, factor: int, recipe: recipes.Recipe = recipes.PLAIN) -> Any:
    """A configuration of a few layers, its features divided by a factor, and what a recipe says."""
    stated = recipes.merged(cls(**recipe.made).to_dict(), recipe.first)
    return cls.from_dict(recipes.merged(_small(json.loads(json.dumps(stated, default=str)), factor), recipe.config))


def _small(stated: dict[str, Any], factor: int) -> dict[str, Any]:
    layers = next((v for k, v in stated.items() if k in ("num_hidden_layers", "n_layer", "num_layers")), None)
    lists = [v for v in stated.values() if isinstance(v, list) and len(v) == layers and len(v) > 2]
    # One layer of each kind.
    kinds = [list(dict.fromkeys(map(str, each))) for each in lists]
    few = max(2, *map(len, kinds)) if kinds else 2
    few = few if few <= 4 else 2
    special = 3
    missing = next((more for key, more in _MISSING.items() if key in stated), {})
    made: dict[str, Any] = {}
    for key, value in (stated | missing).items():
        if key in _STAGES:
            continue
        if isinstance(value, dict) and isinstance(value.get("mrope_section"), list):
            made[key] = value | {"mrope_section": [each // factor or 1 for each in value["mrope_section"]]}
        elif key == "per_layer_config" and isinstance(value, dict):
            made[key] = {each: of for each, of in value.items() if int(each) < few}
        elif isinstance(value, dict) and key not in ("id2label", "label2id", "rope_parameters", "rope_scaling"):
            made[key] = _small(value, factor)
        elif key.endswith(("token_id", "token_index", "_tok_id")) and value is not None:
            usual = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
            number = usual.get(key, special)
            special += key not in usual
            made[key] = [number] if isinstance(value, list) else number
        elif isinstance(value, list):
            if value in lists:
                every = [value[list(map(str, value)).index(each)] for each in dict.fromkeys(map(str, value))]
                made[key] = (every * few)[:few]
            else:
                made[key] = [1] * len(value) if key == "depths" else value
        elif key == "num_experts_per_tok":
            made[key] = 2 if value is None else min(value, 8)
        elif isinstance(value, bool) or not isinstance(value, int):
            made[key] = value
        elif "vocab_size" in key:
            made[key] = min(value, 128)
        elif _EXPERTS.match(key):
            made[key] = min(value, 8)
        elif key in ("n_group", "topk_group", "num_expert_group"):
            made[key] = 1
        elif _LAYERS.match(key) and "groups" not in key:
            made[key] = min(value, few)
        elif key == "attn_layer_period":
            made[key] = 2
        elif key == "attn_layer_offset":
            made[key] = 1
        elif key in ("max_position_embeddings", "n_positions", "n_ctx"):
            made[key] = min(value, 128)
        elif key == "image_size" and isinstance(stated.get("patch_size"), int) and stated["patch_size"] >= 8:
            made[key] = 4 * stated["patch_size"]
        elif value >= 4 * factor and value % factor == 0 and _FEATURES.search(key) and not _NO_FEATURES.search(key):
            made[key] = value // factor
        else:
            made[key] = value
    for heads, size in _HEADS if made.get("head_dim") is None else ():
        if isinstance(count := made.get(heads), int) and isinstance(width := made.get(size), int) and width % count:
            made[heads] = next(each for each in (8, 4, 2, 1) if width % (4 * each) == 0 or each == 1)
            if isinstance(shared := made.get("num_key_value_heads"), int):
                made["num_key_value_heads"] = made[heads] if shared == count else min(shared, made[heads])
    return made


def _even(model: nn.Module, drawn: bool = False) -> None:
    """Give every parameter values: those that a class leaves empty hold whatever memory held.

    Args:
        model: changed.
        drawn: whether matrices and codebooks are drawn anew.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not bool(parameter.isfinite().all()) or float(parameter.abs().max() if parameter.numel() else 0) > 1e3:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        for tensor in (*model.parameters(), *model.buffers()) if drawn else ():
            if tensor.ndim > 1 and tensor.is_floating_point():
                fan = math.prod(tensor.shape[1:])
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 2 * fan**-0.5)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)


def _error(got: Tensor, wanted: Tensor, least: float = 1e-12) -> float:
    if got.shape != wanted.shape:
        return float("inf")
    return float((got.double() - wanted.double()).norm()) / max(float(wanted.double().norm()), least, 1e-12)


def _short(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Bound the processor time of what is done within: a machine that is busy otherwise makes nothing a failure."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"longer than {SECONDS} s of processor time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
