"""What a transformers model does by itself, found out on a copy of it without values."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import json
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ciphertune._support.absent_tensor import only_metadata
from ciphertune.outsourcing.heads import transformers_models
from ciphertune.outsourcing.obstacles import is_conv1d
from ciphertune.outsourcing.walk import walk

_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class Trial:
    """What a model of some class and configuration does.

    Attributes:
        frozen: names of parameters that it makes with ``requires_grad=False``, as fixed positions are.
        read: names of linear layers whose weights its code reads outside of these layers, as Mamba's does.
    """

    frozen: frozenset[str] = frozenset()
    read: frozenset[str] = frozenset()


def frozen_from_birth(model: nn.Module) -> set[int]:
    """Identities of parameters that a transformers model itself froze when it was made."""
    found: set[int] = set()
    for part in transformers_models(model):
        names = _trial(part).frozen
        found |= {id(p) for name, p in part.named_parameters(remove_duplicate=False) if name in names}
    return found


def weights_read(model: nn.Module) -> set[int]:
    """Identities of linear layers whose weights a transformers model's own code reads.

    Found by a forward pass on small inputs, so what it does for others is missed.
    """
    found: set[int] = set()
    for part in transformers_models(model):
        names = _trial(part).read
        found |= {id(module) for path, _, _, module in walk(part) if path in names}
    return found


def _trial(part: Any) -> Trial:
    try:
        kind: Any = part.__class__
        return _try(kind, part.config.to_json_string(use_diff=False))
    except Exception:
        # A class or a configuration of one's own may refuse to be made again: then nothing is known.
        return Trial()


@functools.lru_cache(maxsize=64)
def _try(kind: Any, config: str) -> Trial:
    with torch.device("meta"):
        model = kind(kind.config_class.from_dict(json.loads(config))).eval()
    frozen = frozenset(name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad)
    watch = _Watch(model)
    experts_without_values(model)
    if not watch.run("meta"):
        # Control flow that depends on values.
        fill_with_zeros(model)
        watch.run("cpu")
    return Trial(frozen, frozenset(watch.read))


def experts_without_values(model: Any) -> None:
    """Have a model on the meta device take each token's stacked experts by index.

    As transformers does it by default, products of stacked experts ask for bfloat16 on this device.
    """
    with contextlib.suppress(Exception):  # Older versions have one way, and some models refuse others.
        model.set_experts_implementation("batched_mm")


def fill_with_zeros(model: Any) -> None:
    """Give a model on the meta device zeros for values, which take no memory.

    Its stacked experts are computed one after the other from then on: products of all at once refuse such zeros.
    """
    with contextlib.suppress(Exception):  # As above.
        model.set_experts_implementation("eager")
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in list(tensors.items()):
                if tensor is not None:
                    zeros: Any = torch.zeros((), dtype=tensor.dtype, device="cpu").expand(tensor.shape)
                    tensors[name] = zeros if tensors is module._buffers else nn.Parameter(zeros, False)


def inputs_for(model: Any, device: torch.device, everything: bool = False) -> dict[str, Tensor]:
    """Small inputs of the kind that a transformers model takes: token ids, pixels, sound, or several of them.

    Args:
        model: says by its signature and its configuration what it takes.
        device: of the inputs.
        everything: whether to make all that it takes, and not the main input alone.
    """
    parameters = inspect.signature(model.forward).parameters
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = min(int(getattr(text, "vocab_size", None) or 32), 32)
    ids = torch.arange(2 * _TOKENS, device=device).reshape(2, _TOKENS) % max(1, most - 20) + min(20, most // 2)
    main = getattr(model, "main_input_name", "input_ids")
    found: dict[str, Tensor] = {}
    if {"hidden_states", "grid_thw"} <= parameters.keys():
        return _patches(config, device)
    if "input_ids" in parameters and main in ("input_ids", "pixel_values"):
        found["input_ids"] = ids
    for name in dict.fromkeys((main, *(parameters if everything else ()))):
        if name not in found and name in parameters:
            made = ids if name == "input_ids" else _sound_or_picture(name, config, device)
            found |= {} if made is None else {name: made}
    if "decoder_input_ids" in parameters and getattr(config, "is_encoder_decoder", False):
        found["decoder_input_ids"] = ids
    if "bbox" in parameters:
        found["bbox"] = torch.zeros(2, _TOKENS, 4, dtype=torch.int64, device=device)
    if not found:
        found = {name: value.to(device) for name, value in model.dummy_inputs.items()}
    return found


def _patches(config: Any, device: torch.device) -> dict[str, Tensor]:
    """A picture of four by four patches, cut already, and how many there are: over time, down, and across."""
    sizes = [("temporal_patch_size", 1), ("patch_size", 14), ("patch_size", 14)]
    channels = getattr(config, "in_channels", None) or getattr(config, "in_chans", None) or 3
    features = channels * math.prod(int(getattr(config, name, None) or default) for name, default in sizes)
    values = torch.linspace(0, 40, 16 * features, device=device).sin().reshape(16, features)
    return {"hidden_states": values, "grid_thw": torch.tensor([[1, 4, 4]], device=device)}


def _sound_or_picture(name: str, config: Any, device: torch.device) -> Tensor | None:
    within = ("vision_config", "audio_config", "backbone_config")
    parts = [config, *(getattr(config, part, None) for part in within)]

    def stated(*names: str, default: int) -> int:
        values = [getattr(part, each, None) for part in parts for each in names]
        listed = [value[0] if isinstance(value, (list, tuple)) and value else value for value in values]
        return next((value for value in listed if isinstance(value, int)), default)

    codec = hasattr(config, "codebook_size")
    if name in ("pixel_values", "pixel_values_videos"):
        side = stated("image_size", default=224)
        shape: tuple[int, ...] = (2, stated("num_channels", "in_channels", "in_chans", default=3), side, side)
        if frames := stated("num_frames", default=0):
            shape = (2, frames, *shape[1:])
    elif name == "input_features":
        bins = stated("num_mel_bins", "feature_size", "input_feat_per_channel", default=80)
        positions = stated("max_source_positions", default=0)
        shape = (2, bins, 2 * positions) if positions and hasattr(config, "num_mel_bins") else (2, 100, bins)
    elif name in ("input_values", "input_audio", "audio_values"):
        channels = stated("audio_channels", default=0 if hasattr(config, "conv_dim") or not codec else 1)
        shape = (2, channels, 4000) if channels else (2, 4000)
        if hasattr(config, "max_length") and hasattr(config, "num_mel_bins"):
            shape = (2, stated("max_length", default=100), stated("num_mel_bins", default=80))
    else:
        return None
    values = torch.linspace(0, 40, math.prod(shape), device=device).sin()
    return values.reshape(shape)


class _Watch(TorchFunctionMode):
    """Notes which linear layers' weights are used while none of these layers' own forward runs."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.read: set[str] = set()
        self._model = model
        self._running = 0
        self._layers = {
            name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) or is_conv1d(module)
        }
        for layer in self._layers.values():
            layer.register_forward_pre_hook(self._enter)
            layer.register_forward_hook(self._leave, always_call=True)

    def run(self, device: str) -> bool:
        """Call the model on token ids; whether it came to its end."""
        self._running = 0
        self._weights = {id(layer._parameters["weight"]): name for name, layer in self._layers.items()}
        return self._called(device, everything=False) or self._called(device, everything=True)

    def _called(self, device: str, everything: bool) -> bool:
        try:
            inputs = inputs_for(self._model, torch.device(device), everything)
            with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.device(device), self:
                self._model(**inputs)
        except Exception:
            return False
        return True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._running and not only_metadata(func):
            for value in (*args, *kwargs.values()):
                for each in value if isinstance(value, (list, tuple)) else (value,):
                    if isinstance(each, Tensor) and id(each) in self._weights:
                        self.read.add(self._weights[id(each)])
        return func(*args, **kwargs)

    def _enter(self, *_: Any) -> None:
        self._running += 1

    def _leave(self, *_: Any) -> None:
        self._running -= 1
