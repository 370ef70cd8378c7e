"""Whether an adapter was trained for a model: by the shapes in its file."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ciphertune.checkpoints.files import open_tensors, tensor_shape
from ciphertune.errors import ConfigError
from ciphertune.outsourcing.layers import linear_layers

_PREFIX = "base_model.model."
_SIDES = {".lora_A": 1, ".lora_B": 0}
"""The end of a tensor's name, and the side of a layer's weight (out, in) that it meets."""


def refuse_other_model(folder: str, model: nn.Module) -> None:
    """Raise ``ConfigError`` for an adapter with a layer that the model lacks, or has in another size.

    Args:
        folder: of the adapter, as peft saves it. Shapes are read and no tensor.
        model: not outsourced; its weights may be on the meta device.
    """
    file = Path(folder) / "adapter_model.safetensors"
    if not file.is_file():
        return
    sizes = {
        each.name: tuple(each.weight().shape)
        for each in linear_layers(model, allow_meta=True, trial=False)
        if each.part is None
    }
    handle = open_tensors(file)
    for key in handle.keys():  # noqa: SIM118
        _check(folder, key, tensor_shape(handle, file, key), sizes, model)


def _check(folder: str, key: str, shape: tuple[int, ...], sizes: dict[str, tuple[int, ...]], model: nn.Module) -> None:
    name, _, end = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
    side = _SIDES.get(f".{end}")
    if side is None or len(shape) != 2:
        return  # of another kind of layer, which peft checks
    where = f"the adapter {folder!r} is of another model: "
    if name not in sizes:
        try:
            model.get_submodule(name)
        except AttributeError:
            raise ConfigError(f"{where}this one has no layer {name!r}") from None
        return
    features = sizes[name][side]
    if shape[side] != features:
        what = ("out", "in")[side]
        raise ConfigError(f"{where}it is for {shape[side]} {what}put features of {name!r}, which has {features}")
