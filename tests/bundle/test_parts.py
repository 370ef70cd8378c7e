"""Bundles of models that are no language models: classifiers, images, sentence embeddings, parts of diffusers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import small
import tiny as models
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor, nn

import ciphertune
from ciphertune.bundle.worker import load_worker
from ciphertune.cli import cli
from ciphertune.errors import ConfigError, OutsourcedWeightError, UnknownLayerError
from ciphertune.outsourcing.convolution import outsourced_convolutions
from ciphertune.worker import Worker

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def client(bundle: Any) -> Any:
    worker = Worker(load_worker(bundle.workers[0]))
    return ciphertune.load_client(bundle.client, "clear?weight_bits=16", worker=worker)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_a_classifier_keeps_its_labels_and_head(tmp_path: Path) -> None:
    labels = {0: "no", 1: "yes", 2: "perhaps"}
    plain = small.model("BertForSequenceClassification", id2label=labels, label2id={v: k for k, v in labels.items()})
    plain.save_pretrained(tmp_path / "model")
    model = client(ciphertune.split(str(tmp_path / "model"), tmp_path / "bundle", weight_bits=16))
    assert type(model) is type(plain)
    assert model.config.id2label == labels
    with torch.no_grad():
        assert error(model(input_ids=small.ids()).logits, plain(input_ids=small.ids()).logits) < 1e-3
    assert model.classifier.weight.shape == (3, 32)


@pytest.mark.parametrize("in_memory", [False, True])
def test_what_reads_images_comes_along(tmp_path: Path, in_memory: bool) -> None:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "ViT"}))
    bundle = ciphertune.split(str(tmp_path / "model"), tmp_path / "bundle", weight_bits=16, in_memory=in_memory)
    assert (bundle.client / "preprocessor_config.json").is_file()


@pytest.mark.slow
def test_sentence_embeddings(tmp_path: Path) -> None:
    sentences = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    small.model("BertModel").save_pretrained(tmp_path / "base")
    models.save_words(tmp_path / "base")
    settings = tmp_path / "base" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "pad_token": "<unk>"}))
    made = sentences.SentenceTransformer(
        modules=[modules.Transformer(str(tmp_path / "base")), modules.Pooling(32), modules.Dense(32, 16)], device="cpu"
    )
    made.save_pretrained(str(tmp_path / "model"))
    texts = ["the worker sees only data", "keys today"]
    bundle = ciphertune.split(str(tmp_path / "model"), tmp_path / "bundle", weight_bits=16)
    ours = sentences.SentenceTransformer(str(bundle.client), device="cpu")
    ours[0].model = client(bundle)
    found, wanted = (torch.as_tensor(each.encode(texts)) for each in (ours, made))
    assert error(found, wanted) < 1e-3


@pytest.mark.slow
def test_a_part_of_diffusers(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    plain = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=1, sample_size=8, norm_num_groups=4
    ).eval()
    plain.save_pretrained(tmp_path / "pipeline" / "transformer")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    bundle = ciphertune.split(str(tmp_path / "pipeline" / "transformer"), tmp_path / "bundle", weight_bits=16)
    model = client(bundle)
    assert type(model) is type(plain)
    inputs = {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([3]),
        "class_labels": torch.tensor([1]),
    }
    with torch.no_grad():
        assert error(model(**inputs).sample, plain(**inputs).sample) < 1e-3
    with pytest.raises(OutsourcedWeightError):
        model.save_pretrained(tmp_path / "whole")
    with pytest.raises(ConfigError, match="is a pipeline of diffusers: name one of its parts"):
        ciphertune.split(str(tmp_path / "pipeline"), tmp_path / "other")


def test_a_class_that_diffusers_does_not_have(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "config.json").write_text(json.dumps({"_class_name": "os"}))
    save_file({"weight": torch.ones(1)}, tmp_path / "part" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ConfigError, match="names no model class that diffusers has: 'os'"):
        ciphertune.split(str(tmp_path / "part"), tmp_path / "bundle")


@pytest.mark.parametrize("in_memory", [False, True])
def test_convolutions_are_split(tmp_path: Path, in_memory: bool) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic", num_labels=4
    )
    plain = transformers.ResNetForImageClassification(config).eval()
    plain.save_pretrained(tmp_path / "model")
    bundle = ciphertune.split(
        str(tmp_path / "model"), tmp_path / "bundle", weight_bits=16, convolutions=True, in_memory=in_memory
    )
    assert bundle.layers == 2
    assert bundle.fraction > 0.6
    model = client(bundle)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert error(model(pixel_values=x).logits, plain(pixel_values=x).logits) < 1e-3


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        (["--convolutions"], 2),
        (["--convolution", "*stages.1.layers.0.layer.1.convolution"], 1),
        (["--convolution", "*layer.0.convolution", "--convolution", "*stages.1.layers.0.layer.1.convolution"], 3),
    ],
)
def test_the_command_splits_the_convolutions_that_are_named(options: list[str], layers: int, tmp_path: Path) -> None:
    import transformers

    config = transformers.ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic", num_labels=4
    )
    plain = transformers.ResNetForImageClassification(config).eval()
    plain.save_pretrained(tmp_path / "model")
    arguments = ["split", str(tmp_path / "model"), str(tmp_path / "bundle"), "--weight-bits", "16", *options, "--json"]
    found = json.loads(CliRunner().invoke(cli, arguments, catch_exceptions=False).stdout)
    assert found["layers"] == layers
    worker = Worker(load_worker(Path(found["workers"][0])))
    ours: Any = ciphertune.load_client(found["client"], "clear?weight_bits=16", worker=worker)
    assert len(outsourced_convolutions(ours)) == layers
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert error(ours(pixel_values=x).logits, plain(pixel_values=x).logits) < 1e-3
    with pytest.raises(UnknownLayerError, match="no convolution matches 'nowhere'"):
        CliRunner().invoke(
            cli, [*arguments[:2], str(tmp_path / "other"), "--convolution", "nowhere"], catch_exceptions=False
        )
    assert not (tmp_path / "other").exists()


def test_convolutions_and_token_embeddings(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.SiglipConfig(
        text_config={"vocab_size": 96, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, **sizes},
        vision_config={"image_size": 32, "patch_size": 8, **sizes},
    )
    plain = transformers.SiglipTextModel(config.text_config).eval()
    model = nn.ModuleDict({"text": plain, "picture": nn.Conv2d(4, 64, 3)})
    model.get_input_embeddings = plain.get_input_embeddings  # type: ignore[assignment]
    ids, x = small.ids(), torch.randn(1, 4, 8, 8)
    wanted = plain(input_ids=ids).last_hidden_state, model["picture"](x)
    bundle = ciphertune.split(model, tmp_path / "bundle", weight_bits=16, embeddings=True, convolutions=["picture"])
    skeleton = copy.deepcopy(model).to("meta")
    for name, buffer in model.named_buffers():
        parent, _, attribute = name.rpartition(".")
        setattr(skeleton.get_submodule(parent), attribute, buffer)
    skeleton.get_input_embeddings = skeleton["text"].get_input_embeddings  # type: ignore[assignment,operator]
    worker = Worker(load_worker(bundle.workers[0]))
    ours = ciphertune.load_client(bundle.client, "clear?weight_bits=16", worker=worker, skeleton=skeleton)
    assert error(ours["text"](input_ids=ids).last_hidden_state.detach(), wanted[0].detach()) < 1e-3
    assert error(ours["picture"](x).detach(), wanted[1].detach()) < 1e-3
