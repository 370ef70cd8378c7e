"""Experts whose weights are stacked in one parameter, as transformers 5 keeps those of a mixture."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Side = Literal["inputs", "outputs"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a module of experts keeps its weights, and what it computes with them.

    For each token and each expert that routing chose: ``gate`` of the inputs' products, times the expert's output
    weight, times the weight that routing gave it; the sum of these.

    Attributes:
        inputs: paths of the parameters that a token is multiplied with, in the order in which ``gate`` takes their
            products.
        output: path of the parameter that leads back.
        experts: their number, E.
        hidden: features of a token, H.
        wide: output features of each of ``inputs``, N.
        width: features between, I: what ``gate`` makes of them.
        form: of the parameters: "rows" of (E, out, in), "columns" of (E, in, out), "joined" of (E · I, H), all three.
        gate: called with the module and (rows, sum of the inputs' widths), gives (rows, I).
        input_bias, output_bias: paths of (E, width) biases, which stay at the client.
        norm: path of a module that an expert's output goes through.
        apart: whether the module is called with an input of its own for each expert, (E · tokens, H), zeros where a
            token does not use it, and adds nothing up, as Llama 4's.
    """

    inputs: tuple[str, ...]
    output: str
    experts: int
    hidden: int
    wide: int
    width: int
    form: Literal["rows", "columns", "joined"]
    gate: Callable[[Any, Tensor], Tensor] = dataclasses.field(compare=False)
    input_bias: str | None = None
    output_bias: str | None = None
    norm: str | None = None
    apart: bool = False

    @property
    def widest(self) -> int:
        """Features of all experts on the side of ``inputs``, P · E · N."""
        return len(self.inputs) * self.experts * self.wide

    @property
    def parameters(self) -> tuple[str, ...]:
        """Paths of all parameters that go to the workers."""
        return (*self.inputs, self.output)

    def matrix(self, parameter: str, tensor: Tensor, expert: int) -> Tensor:
        """One expert's part of a parameter as a layer of H input features: (features between, H).

        The output weight is that of the layer in the other direction, so that the sum over experts is one product.
        """
        if self.form == "joined":
            return tensor.view(self.experts, self.width, self.hidden)[expert]
        stored_as_rows = (self.form == "rows") == (parameter != self.output)
        return tensor[expert] if stored_as_rows else tensor[expert].t()

    def stacked(self, parameter: str, matrices: list[Tensor]) -> Tensor:
        """The parameter of which ``matrix`` gave these."""
        if self.form == "joined":
            return torch.cat(matrices)
        whole = torch.stack(matrices)
        stored_as_rows = (self.form == "rows") == (parameter != self.output)
        return whole if stored_as_rows else whole.transpose(1, 2).contiguous()


@dataclasses.dataclass(frozen=True)
class Part:
    """One expert's part of a parameter of several.

    Attributes:
        parameter: its path in the module.
        expert: the expert's number; None for a parameter that cannot be taken apart.
        layout: of the module; None if it is not known.
    """

    parameter: str
    expert: int | None = None
    layout: Layout | None = None

    @property
    def side(self) -> Side:
        """Whether tokens are multiplied with it, or it leads back to them."""
        return "outputs" if self.layout is not None and self.parameter == self.layout.output else "inputs"

    def matrix(self, tensor: Tensor) -> Tensor:
        """This part as the weight of a layer, (features between, H)."""
        if self.layout is None or self.expert is None:
            return tensor.reshape(-1, tensor.shape[-1])
        return self.layout.matrix(self.parameter, tensor, self.expert)


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of a module of experts, None for any other module."""
    if _is_dbrx(module):
        return _dbrx(module)
    if _is_llama4(module):
        return _llama4(module)
    if not _has_interface(module):
        return None
    experts: Any = module
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    first, last = experts._parameters.get(up), experts._parameters.get("down_proj")
    if first is None or last is None or first.dim() != 3 or last.dim() != 3:
        return None
    down = last.shape[1:] if experts.is_transposed else last.shape[:0:-1]
    wide = first.shape[2] if experts.is_transposed else first.shape[1]
    hidden = first.shape[1] if experts.is_transposed else first.shape[2]
    width = int(down[0])
    fits = (len(first), int(down[1]), wide) == (len(last), hidden, width * (1 + bool(experts.has_gate)))
    if not fits or len(first) != getattr(experts, "num_experts", len(first)):
        return None
    return Layout(
        inputs=(up,),
        output="down_proj",
        experts=len(first),
        hidden=int(hidden),
        wide=int(wide),
        width=width,
        form="columns" if experts.is_transposed else "rows",
        gate=_gate if experts.has_gate else _activation,
        input_bias=f"{up}_bias" if experts.has_bias else None,
        output_bias="down_proj_bias" if experts.has_bias else None,
        norm="post_expert_norm" if experts.has_post_expert_norm else None,
    )


def stacked_parameters(module: nn.Module) -> list[str]:
    """Names of a module's own parameters that hold several matrices, each a weight that its code multiplies with."""
    if isinstance(module, (nn.modules.conv._ConvNd, nn.MultiheadAttention, nn.RNNBase, nn.Bilinear)):
        return []
    if isinstance(module, parametrize.ParametrizationList):
        return []  # what another module's weight is computed from
    return [
        name
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() == 3 and min(parameter.shape) > 1 and parameter.is_floating_point()
    ]


def _has_interface(module: nn.Module) -> bool:
    """Whether this is of a class that transformers' ``use_experts_implementation`` made.

    Its description of a class is complete: transformers computes with it in ways of its own (``batched_mm``).
    """
    flags = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")
    return "transformers.integrations.moe" in sys.modules and all(flag in vars(module) for flag in flags)


def _gate(module: Any, products: Tensor) -> Tensor:
    gated: Tensor = module._apply_gate(products)
    return gated


def _activation(module: Any, products: Tensor) -> Tensor:
    activated: Tensor = module.act_fn(products)
    return activated


def _is_dbrx(module: nn.Module) -> bool:
    dbrx = sys.modules.get("transformers.models.dbrx.modeling_dbrx")
    return dbrx is not None and type(module) is getattr(dbrx, "DbrxExperts", None)


def _dbrx(module: Any) -> Layout:
    return Layout(
        inputs=("mlp.w1", "mlp.v1"),
        output="mlp.w2",
        experts=module.num_experts,
        hidden=module.hidden_size,
        wide=module.ffn_hidden_size,
        width=module.ffn_hidden_size,
        form="joined",
        gate=_dbrx_gate,
    )


def _is_llama4(module: nn.Module) -> bool:
    llama4 = sys.modules.get("transformers.models.llama4.modeling_llama4")
    return llama4 is not None and type(module) is getattr(llama4, "Llama4TextExperts", None)


def _llama4(module: Any) -> Layout:
    return Layout(
        inputs=("gate_up_proj",),
        output="down_proj",
        experts=module.num_experts,
        hidden=module.hidden_size,
        wide=2 * module.expert_dim,
        width=module.expert_dim,
        form="columns",
        gate=_llama4_gate,
        apart=True,
    )


def _llama4_gate(module: Any, products: Tensor) -> Tensor:
    gate, up = products.chunk(2, dim=-1)
    gated: Tensor = up * module.act_fn(gate)
    return gated


def _dbrx_gate(module: Any, products: Tensor) -> Tensor:
    gate, up = products.chunk(2, dim=-1)
    gated: Tensor = module.mlp.activation_fn(gate) * up
    return gated
