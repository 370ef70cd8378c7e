"""Convolutions at the workers: forward and backward over patches, restored, chosen by what they save."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ciphertune
from ciphertune.errors import InputError, NothingOutsourcedError, UnknownLayerError, UnsupportedLayerError
from ciphertune.outsourcing.convolution import OutsourcedConv, outsourced_convolutions, sent_per_value


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).detach().norm() / wanted.detach().norm())


KINDS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "patches": (nn.Conv2d(3, 8, 4, stride=4), (2, 3, 8, 8)),
    "overlapping": (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 7)),
    "strided and dilated": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(2, 1)), (2, 4, 9, 8)),
    "same": (nn.Conv2d(4, 6, 3, padding="same", bias=False), (2, 4, 6, 5)),
    "reflected": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 6, 6)),
    "one picture": (nn.Conv2d(4, 6, 3), (4, 6, 6)),
    "one dimension": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 11)),
    "circular": (nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), (2, 4, 9)),
    "one row of sound": (nn.Conv1d(4, 6, 3), (4, 9)),
}


@pytest.mark.parametrize(("to", "tolerance"), [("clear", 1e-5), ("mlwe?weight_bits=16", 0.02)])
@pytest.mark.parametrize("kind", list(KINDS))
def test_forward_and_backward(kind: str, to: str, tolerance: float) -> None:
    plain, shape = KINDS[kind]
    ours = ciphertune.outsource(nn.Sequential(copy.deepcopy(plain)), to, convolutions=["0"])
    assert isinstance(ours[0], OutsourcedConv)
    assert isinstance(ours[0], type(plain))
    x, y = (torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2))
    wanted, found = plain(x), ours(y)
    assert found.shape == wanted.shape
    assert error(found, wanted) < tolerance
    torch.tanh(wanted).sum().backward()
    torch.tanh(found).sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert error(y.grad, x.grad) < 3 * tolerance
    ciphertune.restore(ours)
    assert type(ours[0]) is type(plain)
    if to == "clear":
        assert torch.equal(ours[0].weight, plain.weight)  # type: ignore[arg-type]


def convnext() -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.ConvNextConfig(hidden_sizes=[32, 64], depths=[1, 1], num_stages=2, num_labels=4)
    return transformers.ConvNextForImageClassification(config)


def resnet() -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic", num_labels=4
    )
    return transformers.ResNetForImageClassification(config)


@pytest.mark.parametrize(("make", "convolutions"), [(convnext, 1), (resnet, 2)])
def test_a_small_network_of_pictures_is_fine_tuned(make: Any, convolutions: int) -> None:
    plain = make()
    for name, parameter in plain.named_parameters():
        # The head, and what normalizes before it in every block, are trained: gradients cross every convolution.
        parameter.requires_grad_("classifier" in name or "norm" in name)
    ours = ciphertune.outsource(copy.deepcopy(plain), "mlwe", convolutions=True)
    assert len(outsourced_convolutions(ours)) == convolutions
    share = ciphertune.share(ours)
    assert share.layers >= convolutions
    assert share.fraction > 0.6
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(4)
    losses: list[list[float]] = []
    for model in (plain, ours):
        model.train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        found = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(pixel_values=x, labels=labels).loss
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
        losses.append(found)
    assert losses[0][-1] < losses[0][0] - 0.05
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_choice() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 64, 3), nn.Conv2d(64, 64, 3, groups=64), nn.Flatten(), nn.Linear(64, 4)
    )
    assert outsourced_convolutions(ciphertune.outsource(copy.deepcopy(model), "clear")) == []
    by_default = ciphertune.outsource(copy.deepcopy(model), "clear", convolutions=True)
    assert [each.name for each in outsourced_convolutions(by_default)] == ["1"]
    assert sent_per_value(outsourced_convolutions(by_default)[0]) == 9
    every = ciphertune.outsource(copy.deepcopy(model), "clear", convolutions=nn.Conv2d)
    assert [each.name for each in outsourced_convolutions(every)] == ["0", "1"]
    with pytest.raises(UnsupportedLayerError, match="2 cannot be outsourced: its channels are in 64 groups"):
        ciphertune.outsource(model, "clear", convolutions=["2"])
    with pytest.raises(UnknownLayerError, match="no convolution matches '7'"):
        ciphertune.outsource(model, "clear", convolutions="7")
    with pytest.raises(NothingOutsourcedError, match="0: its patches cost more than it saves"):
        ciphertune.outsource(nn.Sequential(nn.Conv2d(3, 8, 3)), "clear", convolutions=True)


def test_inputs_that_do_not_fit() -> None:
    model = ciphertune.outsource(nn.Sequential(nn.Conv2d(4, 6, 3)), "clear", convolutions=["0"])
    with pytest.raises(InputError, match=r"0: expected an input of shape \(batch, 4, …\)"):
        model(torch.randn(2, 3, 8, 8))
    with pytest.raises(InputError, match=r"is smaller than the kernel \(3, 3\)"):
        model(torch.randn(2, 4, 2, 2))
    with pytest.raises(InputError, match="floating-point"):
        model(torch.ones(2, 4, 8, 8, dtype=torch.int64))


def test_half_precision_and_autocast() -> None:
    model = ciphertune.outsource(nn.Sequential(nn.Conv2d(4, 6, 3)).to(torch.bfloat16), "clear", convolutions=["0"])
    assert model(torch.randn(2, 4, 8, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(torch.randn(2, 4, 8, 8)).dtype == torch.bfloat16


def test_adapters_of_convolutions() -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = ciphertune.outsource(nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten()), "clear", convolutions=["0"])
    adapted = get_peft_model(model, LoraConfig(target_modules=["0"], r=2))
    adapted(torch.randn(2, 4, 8, 8)).sum().backward()
    grads = [p.grad for n, p in adapted.named_parameters() if "lora_" in n]
    assert len(grads) == 2
    assert all(grad is not None for grad in grads)
