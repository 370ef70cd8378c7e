"""Plans of pictures and of convolutions: what they say travels is what travels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import small
import tiny
import torch
from click.testing import CliRunner

import ciphertune
from ciphertune import session_of
from ciphertune.cli import cli
from ciphertune.errors import ConfigError, NothingOutsourcedError
from ciphertune.planning.plan import Plan, make_plan
from ciphertune.planning.rows import rows_of_token

transformers: Any = pytest.importorskip("transformers")


def resnet() -> Any:
    config = transformers.ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64], depths=[1, 2], layer_type="basic", num_labels=4
    )
    return transformers.ResNetForImageClassification(config)


def convnext() -> Any:
    config = transformers.ConvNextConfig(hidden_sizes=[32, 64], depths=[1, 1], num_stages=2, num_labels=4)
    return transformers.ConvNextForImageClassification(config)


def vit() -> Any:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    return transformers.ViTForImageClassification(config)


def canine() -> Any:
    config = transformers.CanineConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_position_embeddings=128,
        num_hash_buckets=128, num_labels=2, local_transformer_stride=32,
    )  # fmt: skip
    return transformers.CanineForSequenceClassification(config)


MODELS: dict[str, tuple[Any, Any, str]] = {
    "resnet": (resnet, True, "encoder.stages.1.layers.0.layer.1.convolution"),
    "one of resnet": (resnet, ["*stages.1.layers.1.layer.0.convolution"], "embedder.embedder.normalization"),
    "convnext": (convnext, ["*downsampling_layer.1"], "pwconv1"),
    "vit": (vit, ["projection"], "q_proj"),
}


def same(found: Plan, model: Any) -> None:
    traffic = session_of(model).traffic
    assert (found.requests, found.bytes_up, found.bytes_down) == (
        traffic.requests,
        traffic.bytes_up,
        traffic.bytes_down,
    )
    part = ciphertune.share(model)
    assert (found.outsourced, found.at_client) == (part.outsourced, part.at_client)


@pytest.mark.parametrize("to", ["clear", "mlwe"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_step_of_pictures_sends_what_was_planned(kind: str, to: str, tmp_path: Path) -> None:
    make, chosen, trained = MODELS[kind]
    model = make()
    model.save_pretrained(tmp_path / "model")
    size = 32 if kind == "vit" else 40
    found = make_plan(
        str(tmp_path / "model"),
        to,
        pictures=3,
        picture_size=size,
        convolutions=chosen,
        targets=[trained],
        measure=False,
    )
    model.requires_grad_(False)
    ciphertune.outsource(model, to, convolutions=chosen)
    for name, module in model.named_modules():
        if name.endswith(trained):
            parameter = module.bias if getattr(module, "bias", None) is not None else None
            if parameter is None:  # A gradient of its output, as an adapter asks for.
                module.register_forward_hook(lambda _, __, output: output.requires_grad_())
            else:
                parameter.requires_grad_()
    model(pixel_values=torch.randn(3, 3, size, size)).logits.sum().backward()
    same(found, model)


def test_patches_of_a_text_follow_from_its_length(tmp_path: Path) -> None:
    model = canine()
    model.save_pretrained(tmp_path / "model")
    asked: dict[str, Any] = {
        "layers": ["initial_char_encoder.layer.0.attention.self.query"],
        "convolutions": ["chars_to_molecules.conv"],
    }
    found = make_plan(
        str(tmp_path / "model"), "mlwe", tokens=256, length=128, targets=["classifier"], measure=False, **asked
    )
    ciphertune.outsource(model, "mlwe", **asked)
    with torch.no_grad():
        model(input_ids=torch.full((2, 128), 5))
    # CANINE calls the query once for each window of letters.
    traffic = session_of(model).traffic
    assert (found.bytes_up, found.bytes_down) == (traffic.bytes_up, traffic.bytes_down)


def test_the_plan_of_a_run_s_file_counts_its_convolutions(tmp_path: Path) -> None:
    canine().save_pretrained(tmp_path / "model")
    tiny.save_letters(tmp_path / "model")
    rows = [{"text": "no fever" if n % 2 else "high fever", "label": "well" if n % 2 else "ill"} for n in range(8)]
    (tmp_path / "notes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = []
    for line in ("", 'convolutions = ["chars_to_molecules.conv"]'):
        file = tmp_path / "run.toml"
        file.write_text(
            f'task = "classification"\nto = "clear"\n{line}\n[model]\nname = "model"\n[data]\nsource = '
            '"notes.jsonl"\nlength = 128\nheld_out = 0\nbatch_size = 2\n[lora]\ntarget_modules = '
            '["initial_char_encoder.layer.0.attention.self.query"]\n[training]\noutput = "out"\nsteps = 1\n'
        )
        text = CliRunner().invoke(cli, ["plan", str(file), "--no-measure", "--json"], catch_exceptions=False).stdout
        found.append(json.loads(text))
    without, with_it = found
    assert (
        with_it["outsourced"] - without["outsourced"] == 32 * 32 * 4
    )  # A kernel of the four letters that a molecule has.
    assert with_it["requests"] == without["requests"] + 2
    with pytest.raises(ConfigError, match="--convolution: a run's file says this"):
        CliRunner().invoke(cli, ["plan", str(file), "--convolution", "conv"], catch_exceptions=False)


def test_the_command(tmp_path: Path) -> None:
    convnext().save_pretrained(tmp_path / "model")
    arguments = ["plan", str(tmp_path / "model"), "--pictures", "2", "--picture-size", "64", "--target", "pwconv1"]
    found = json.loads(
        CliRunner()
        .invoke(cli, [*arguments, "--convolution", "*downsampling_layer.1", "--json"], catch_exceptions=False)
        .stdout
    )
    assert found["pictures"] == 2
    assert found["estimate"]["total"] > 0
    conv = next(kind for kind in found["kinds"] if kind["layers"] == "1")
    # 64 pixels, patches of four, then of two: eight places each way; 32 channels of two by two values.
    clear = make_plan(
        str(tmp_path / "model"),
        "clear",
        pictures=2,
        picture_size=64,
        convolutions=["*downsampling_layer.1"],
        targets=(),
    )
    of_clear = next(kind for kind in clear.kinds if kind.layers == "1")
    assert conv["in_features"] == 32 * 2 * 2
    assert of_clear.bytes_up >= 2 * 8 * 8 * conv["in_features"] * 4
    text = CliRunner().invoke(cli, [*arguments, "--no-measure"], catch_exceptions=False).stdout
    assert "A step of 2 pictures" in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pictures": 2, "picture_size": 0}, "above 0"),
        ({"picture_size": 8}, "needs the number of pictures"),
        ({"pictures": 0}, "above 0"),
        ({"convolutions": ["projection"]}, "by --pictures how many"),
        ({"pictures": 2, "picture_size": 33}, "does not compute pictures of 33 pixels"),
    ],
)
def test_what_cannot_be_is_refused(options: Any, said: str, tmp_path: Path) -> None:
    vit().save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=said):
        make_plan(str(tmp_path / "model"), measure=False, **options)


def test_a_model_of_texts_has_no_pictures() -> None:
    with pytest.raises(ConfigError, match="takes pictures"):
        make_plan("smollm2", pictures=2, measure=False)
    with pytest.raises(NothingOutsourcedError, match="the model has none"):
        make_plan("smollm2", convolutions=True, measure=False)


def test_rows_behind_stacked_experts() -> None:
    sizes = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(small.config("Mixtral", **sizes))
    assert rows_of_token(model, ["model.layers.1.self_attn.q_proj"], 8) == {"model.layers.1.self_attn.q_proj": 1.0}
