"""What keeping channels with outliers at the client does to the error of products, on made-up data and on real models.

`python benchmarks/outliers.py` measures a channel that is 1, 1,000 and 10,000 times as large as the others.
`python benchmarks/outliers.py smollm2` and `python benchmarks/outliers.py FOLDER`, a folder of a transformers model,
measure the model's own activations and gradients, on text that it was not calibrated with. Errors of the encryption are
those that it states (`simulation`). The last line of each is JSON.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import ciphertune
from ciphertune.client.choice import choose
from ciphertune.models.load import load_named_model
from ciphertune.outsourcing.calibration import Calibration, calibrate, public_batches
from ciphertune.outsourcing.layers import Candidate, choose_layers, sibling_groups
from ciphertune.outsourcing.outliers import keep_channels, products_with_outliers, set_inputs_aside, set_outputs_aside
from ciphertune.plugins.manager import PluginManager
from ciphertune.weights import LayerInfo, LayerWeight, describe, group_map, quantize

FACTORS = 1.0, 1e3, 1e4


def made_up(features: int, outputs: int, tokens: int, to: str) -> list[dict[str, float]]:
    """Errors of a product, over the part of the signal that the ordinary channels have in it."""
    torch.manual_seed(0)
    layer = nn.Linear(features, outputs, bias=False)
    nn.init.normal_(layer.weight)
    rows = []
    for factor in FACTORS:
        x, public = torch.randn(tokens, features), torch.randn(256, features)
        x[:, 5] *= factor
        public[:, 5] *= factor
        calibration = calibrate(nn.Sequential(layer), [public])
        exact = (x.double() @ layer.weight.detach().double().t()).float()
        ordinary = x.clone()
        ordinary[:, 5] = 0
        signal = (ordinary @ layer.weight.detach().t()).norm()
        row = {"factor": factor}
        for name, backend, given in (
            ("weight alone", "clear?weight_bits=8", None),
            ("without", to, None),
            ("with", to, calibration),
        ):
            model = ciphertune.outsource(nn.Sequential(layer), backend, calibration=given)
            with torch.no_grad():
                row[name] = float((model(x) - exact).norm() / signal)
            ciphertune.restore(model)
        rows.append(row)
    return rows


class Group:
    """A group of layers, with and without kept channels, whose errors are measured as its layers are called.

    Args:
        layers, weights: of the group.
        calibration: of the model.
    """

    def __init__(self, layers: list[LayerInfo], weights: list[Tensor], calibration: Calibration) -> None:
        self.layers = {"without": layers, "with": keep_channels(layers, weights, calibration)}
        self.weights = weights
        self.codes = [quantize(weight, 8) for weight in weights]
        self.backend = choose("mlwe").backend
        self.found: dict[str, list[Tensor]] = {}

    def forward(self, member: int, x: Tensor) -> None:
        """Errors of one layer's output, by token."""
        weight, codes = self.weights[member], self.codes[member]
        signal = (x @ weight.t()).square().sum(1)
        for name, layers in self.layers.items():
            sent, _ = set_inputs_aside(x, layers)
            # The part of kept channels has the rounding of 16 bits alone, which is left out.
            error = (sent @ (codes.dequantize() - weight).t()).square().sum(1)
            error += self._encryption(sent, layers, "forward", codes)
            self._add("forward", name, error, signal)

    def backward(self, gradients: list[Tensor]) -> None:
        """Errors of the gradient of the group's input, by token."""
        exact = sum(g @ w for g, w in zip(gradients, self.weights, strict=True))
        signal = torch.as_tensor(exact).square().sum(1)
        for name, layers in self.layers.items():
            scaled = [g * (c.scale if c.scale is not None else 1) for g, c in zip(gradients, self.codes, strict=True)]
            sent = set_outputs_aside(torch.cat(scaled, 1), layers)
            codes = torch.cat([c.codes for c in self.codes]).float()
            units = torch.cat([c.scale.expand(len(c.codes)) for c in self.codes if c.scale is not None])
            truth = torch.cat(self.weights) / units.clamp_min(1e-30)[:, None]
            error = (sent @ (codes - truth)).square().sum(1)
            error = error + self._variance(sent, layers, "backward", codes.square().sum(0)).sum(1)
            self._add("backward", name, error, signal)

    def _encryption(self, sent: Tensor, layers: list[LayerInfo], direction: Any, codes: LayerWeight) -> Tensor:
        assert codes.scale is not None
        variance = self._variance(sent, layers, direction, codes.codes.float().square().sum(1))
        return (variance * codes.scale.square()).sum(1)

    def _variance(self, sent: Tensor, layers: list[LayerInfo], direction: Any, squares: Tensor) -> Tensor:
        """Variances of outputs whose rows of codes have these squared norms, (tokens, outputs)."""
        whole = group_map(layers, direction)
        noise = self.backend.noise(whole)
        assert noise is not None
        unit = noise.token_scale(sent, whole).reciprocal().square().float()
        return unit[:, None] * (noise.input_variance * squares + noise.returned_variance)

    def _add(self, direction: str, name: str, error: Tensor, signal: Tensor) -> None:
        self.found.setdefault(f"{direction} {name}", []).append((error / signal.clamp_min(1e-30)).sqrt())


def real(name: str) -> dict[str, Any]:
    """Errors of a model's groups, and the channels that are kept."""
    model, tokenizer = load_named_model(name, whole=True)
    if next(model.parameters()).dtype != torch.float32:  # GGUF models are in float32, and refuse to be asked
        model = model.float()
    model = model.eval().requires_grad_(False)
    calibration = calibrate(model, public_batches(tokenizer))
    chosen = choose_layers(model, None, PluginManager())
    groups = sibling_groups(chosen, [candidate.weight().shape[1] for candidate in chosen])
    made = []
    for members in groups:
        part = [chosen[i] for i in members]
        weights = [candidate.weight().detach().float() for candidate in part]
        infos = [describe(each.name, quantize(weight, 8)) for each, weight in zip(part, weights, strict=True)]
        made.append(Group(infos, weights, calibration))
        watch(made[-1], part)
    run(model, tokenizer)
    report: dict[str, Any] = {
        "model": name,
        "products": 2 * len(made),
        "with outliers": products_with_outliers([group.layers["with"] for group in made]),
        "kinds": kinds_of(made),
    }
    report["channels"] = {
        layer.name: [layer.kept.inputs.tolist(), layer.kept.outputs.tolist()]
        for group in made
        for layer in group.layers["with"]
        if layer.kept is not None
    }
    return report


def kinds_of(groups: list[Group]) -> dict[str, Any]:
    """Errors by kind of layer and direction, over the groups of which channels are kept in that direction."""
    kinds: dict[str, Any] = {}
    for group in groups:
        layers = group.layers["with"]
        kind = " + ".join(".".join(layer.name.split(".")[-2:]) for layer in layers)
        for direction in ("forward", "backward"):
            if f"{direction} with" not in group.found:
                continue
            kept = [
                layer.kept.inputs if direction == "forward" else layer.kept.outputs for layer in layers if layer.kept
            ]
            row = kinds.setdefault(f"{kind}, {direction}", {"groups": 0, "kept in": 0, "without": [], "with": []})
            row["groups"] += 1
            if any(map(len, kept)):
                row["kept in"] += 1
                for name in ("without", "with"):
                    row[name].append(torch.cat(group.found[f"{direction} {name}"]))
    for row in kinds.values():
        for name in ("without", "with"):
            errors = row.pop(name)
            row[f"median {name}"] = median([float(each.median()) for each in errors]) if errors else None
            row[f"worst 99th percentile {name}"] = max((float(each.quantile(0.99)) for each in errors), default=None)
    return kinds


def watch(group: Group, part: list[Candidate]) -> None:
    """Measure a group whenever its layers are called, and when their gradients have come."""
    gradients: dict[int, Tensor] = {}

    def hook(member: int) -> Callable[..., None]:
        def forward(module: nn.Module, args: Any, output: Tensor) -> None:
            group.forward(member, args[0].detach().flatten(0, -2))
            if not output.requires_grad:
                output.requires_grad_()

            def backward(gradient: Tensor) -> None:
                gradients[member] = gradient.flatten(0, -2)
                if len(gradients) == len(part):
                    group.backward([gradients.pop(i) for i in range(len(part))])

            output.register_hook(backward)  # type: ignore[no-untyped-call]

        return forward

    for member, candidate in enumerate(part):
        candidate.module.register_forward_hook(hook(member))


def run(model: Any, tokenizer: Any) -> None:
    """Call the model with text that it was not calibrated with, and its loss backwards if it has one."""
    topics = importlib.import_module("pydoc_data.topics").topics
    text = "\n\n".join(topics[name] for name in sorted(topics, reverse=True)[:40])
    ids = torch.tensor([tokenizer(text, verbose=False)["input_ids"][:256]])
    result = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    if getattr(result, "logits", None) is not None:
        nn.functional.cross_entropy(result.logits[0, :-1], ids[0, 1:]).backward()  # type: ignore[no-untyped-call]


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="smollm2, or a folder of a transformers model")
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--to", default="mlwe?request_bits=24", help="selection string, for made-up data")
    options = parser.parse_args()
    if options.model is None:
        rows = made_up(options.features, 256, 256, options.to)
        for row in rows:
            print("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
        print(json.dumps(rows))
        return
    report = real(options.model)
    print(f"{report['model']}: channels kept in {report['with outliers']} of {report['products']} products")
    for kind, row in report["kinds"].items():
        told = (f"{name} {100 * value:.2f}%" for name, value in row.items() if isinstance(value, float))
        print(f"{kind}: kept in {row['kept in']} of {row['groups']}; " + ", ".join(told))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
