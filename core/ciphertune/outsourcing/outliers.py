"""Channels with outliers, multiplied at the client: which they are, and their part of a product.

Activations and gradients have channels whose values lie far above the others'. A token's scale follows its norm, and
the error from an int8 weight's rounding does too: a few such channels cost all others precision, whatever the
encryption and however many bits it sends. So the product is split as by LLM.int8 (Dettmers et al., NeurIPS 2022): the
few channels are zeros in the request, and the client adds their part in float32, from columns of the weight that it
holds.

Nothing in this depends on an encryption, so it is done around the session's products, for every backend that holds
weights in integers; with float32 weights there is nothing to gain.

The channels are fixed before the first product, from public text. A list that followed private data would tell of it,
in the folder that it is written to and in the time that the client takes. Requests have the same length with a list,
with another one, and with none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ciphertune.outsourcing.calibration import Calibration
from ciphertune.weights import MOST_CHANNELS, KeptChannels, LayerInfo, quantize

_FAR = 6.0
"""An outlier's root mean square over that of the median channel, at least. Eight that just reach it among 576 channels
add a third to the square of the norm; below that, little is gained."""


def keep_channels(
    layers: Sequence[LayerInfo], weights: Sequence[Tensor], calibration: Calibration | None
) -> list[LayerInfo]:
    """The layers of one group, with the channels that the client is to multiply itself.

    Args:
        layers: what is known of each; they share their input.
        weights: of each, (N, K), any floating dtype.
        calibration: of the model; None to keep no channel.
    """
    if calibration is None or any(layer.scale is None for layer in layers):
        return list(layers)
    found = [calibration.inputs[layer.name] for layer in layers if layer.name in calibration.inputs]
    inputs = _outliers(torch.stack(found).amax(0)) if found else torch.empty(0, dtype=torch.int64)
    outputs = _outliers(torch.cat([_sent(layer, calibration) for layer in layers]))
    kept = []
    row = 0
    for layer, weight in zip(layers, weights, strict=True):
        own = outputs[(outputs >= row) & (outputs < row + layer.out_features)] - row
        row += layer.out_features
        if len(inputs) + len(own) == 0:
            kept.append(layer)
            continue
        columns = quantize(weight.detach()[:, inputs.to(weight.device)].t(), 16)
        rows = quantize(weight.detach()[own.to(weight.device)], 16)
        kept.append(dataclasses.replace(layer, kept=KeptChannels(inputs, columns, own, rows)))
    return kept


def products_with_outliers(groups: Sequence[Sequence[LayerInfo]]) -> int:
    """Products, forward and backward of each group, of which the client keeps channels."""
    kept = [[layer.kept for layer in group if layer.kept is not None] for group in groups]
    return sum(any(len(each.inputs) for each in group) + any(len(each.outputs) for each in group) for group in kept)


def set_inputs_aside(x: Tensor, layers: Sequence[LayerInfo]) -> tuple[Tensor, Tensor | None]:
    """What is sent of a group's input, and what stays.

    Args:
        x: (tokens, K).
        layers: of the group.

    Returns:
        x with zeros in its kept channels, and these channels, (tokens, A); x itself and None where none is kept.
    """
    kept = layers[0].kept
    if kept is None or kept.inputs.shape[0] == 0:
        return x, None
    # Times zero and not zeros: NaN and infinity must be seen where products are refused for them.
    return x * kept.sent_inputs.to(x.device), x.index_select(1, kept.inputs.to(x.device))


def set_outputs_aside(stacked: Tensor, layers: Sequence[LayerInfo]) -> Tensor:
    """What is sent of the stacked gradients of a group's outputs, (tokens, N): zeros in the kept channels."""
    kept = []
    row = 0
    for layer in layers:
        if layer.kept is not None:
            kept.append(layer.kept.outputs + row)
        row += layer.out_features
    channels = torch.cat(kept).to(stacked.device) if kept else None
    if channels is None or len(channels) == 0:
        return stacked
    sent = stacked.clone()
    # Times zero, as above.
    sent[:, channels] = sent[:, channels] * 0
    return sent


def add_inputs(output: Tensor, aside: Tensor | None, layer: LayerInfo) -> Tensor:
    """Add to a layer's output, (tokens, N), in place, the part of the channels that stayed."""
    if aside is not None and layer.kept is not None:
        output.addmm_(aside, layer.kept.column_values.to(output.device))
    return output


def add_outputs(product: Tensor, gradients: Sequence[Tensor | None], layers: Sequence[LayerInfo]) -> Tensor:
    """The gradient of a group's input, (tokens, K), with the part of the channels that stayed.

    Args:
        product: the gradient without them.
        gradients: of each layer's outputs, (tokens, N); None for zeros.
        layers: of the group.
    """
    for gradient, layer in zip(gradients, layers, strict=True):
        if gradient is not None and layer.kept is not None and len(layer.kept.outputs):
            aside = gradient[:, layer.kept.outputs.to(gradient.device)]
            product = torch.addmm(product, aside, layer.kept.rows.dequantize().to(product.device))
    return product


def _sent(layer: LayerInfo, calibration: Calibration) -> Tensor:
    """Mean squares of a layer's output gradients as they are sent, times the channels' scales; zeros if unknown."""
    assert layer.scale is not None
    found = calibration.outputs.get(layer.name)
    if found is None:
        return torch.zeros(layer.out_features, dtype=torch.float64)
    return found * layer.scale.cpu().double() ** 2


def _outliers(squares: Tensor) -> Tensor:
    """Channels whose root mean square is far above the median's, rising; the largest of them if they are many."""
    roots = squares.sqrt()
    largest, channels = roots.topk(min(MOST_CHANNELS, len(roots)))
    return channels[largest > _FAR * roots.median()].sort().values
