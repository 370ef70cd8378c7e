"""What a transformers model does by itself, found out on a copy of it without values."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ciphertune._support.absent_tensor import only_metadata
from ciphertune.outsourcing.heads import transformers_models
from ciphertune.outsourcing.obstacles import is_conv1d
from ciphertune.outsourcing.walk import walk


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

    Found by a forward pass on token ids, so what it does for other inputs is missed.
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
    if not watch.run("meta"):
        # Control flow that depends on values: zeros, which take no memory.
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in list(tensors.items()):
                    if tensor is not None:
                        zeros: Any = torch.zeros((), dtype=tensor.dtype, device="cpu").expand(tensor.shape)
                        tensors[name] = zeros if tensors is module._buffers else nn.Parameter(zeros, False)
        watch.run("cpu")
    return Trial(frozen, frozenset(watch.read))


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
        inputs = {name: value.to(device) for name, value in self._model.dummy_inputs.items()}
        if self._model.config.is_encoder_decoder:
            inputs.setdefault("decoder_input_ids", inputs["input_ids"])
        try:
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
