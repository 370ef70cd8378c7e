"""Every tuner of the installed peft, named in a run's file."""

from __future__ import annotations

import copy
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import tuners
from safetensors.torch import load_file

import ciphertune
from ciphertune.errors import ConfigError
from ciphertune.planning.run import read_run
from ciphertune.runs.adapters import adapted, check_adapters
from ciphertune.runs.config import load_config, parse_config
from ciphertune.runs.train import RunResult, run_training
from ciphertune.training.tuners import learns_prompts, refusal

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytestmark = [
    pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
TAUGHT = [tuner for tuner in tuners.named() if tuner != "LORA" and refusal(tuner, bundle=False) is None]
REFUSED = [tuner for tuner in tuners.named() if tuner != "LORA" and tuner not in TAUGHT]


def toml(value: Any) -> str:
    return json.dumps(value)


def inline(options: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{name} = {toml(value)}" for name, value in options.items()) + "}"


def file_of(
    project: Path, section: str, *, to: str = "clear", model: str = "model", more: str = "", top: str = ""
) -> Path:
    file = project / "tuned.toml"
    file.write_text(
        f'to = "{to}"\n{top}[model]\nname = "{model}"\n[data]\nsource = "text.txt"\nlength = 16\nbatch_size = 8\n'
        f'{section}\n[training]\noutput = "tuned"\nsteps = 4\nlearning_rate = 0.02\n{more}'
    )
    return file


def run(file: Path, **options: Any) -> RunResult:
    return run_training(load_config(file), overwrite=True, **options)


def section_of(tuner: str) -> str:
    options = dict(tuners.OPTIONS.get(tuner, {}))
    options.pop("total_step", None)  # which a run knows
    if learns_prompts(tuner) and tuner != "CPT":
        options.setdefault("num_virtual_tokens", 3)
    if tuner == "ADALORA":
        options |= {"tinit": 1, "tfinal": 1}
    return f'[tuner]\nname = "{tuner.lower().replace("_", "-")}"\noptions = {inline(options)}'


@pytest.fixture(scope="module")
def llama() -> Any:
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64}
    torch.manual_seed(0)
    return tiny.llama(**sizes, num_attention_heads=2, num_key_value_heads=1)


def learned(llama: Any, section: str, folder: Path, **options: Any) -> dict[str, Any]:
    """Train what a file names for some steps; the saved adapter must be what was trained. Returns its configuration."""
    from peft import PeftModel

    rest = {"model": {"name": "model"}, "data": {"source": "text.txt", "length": 16}, "training": {"output": "o"}}
    config = parse_config({**tomllib.loads(section), **rest})
    check_adapters(config)
    task: Any = types.SimpleNamespace(peft_task=None, trained_whole=list)
    model = ciphertune.outsource(adapted(copy.deepcopy(llama), config, task, steps=4), "clear")
    ids = torch.arange(1, 33).view(2, 16)
    trainer = ciphertune.LoraTrainer(model, steps=4, learning_rate=0.02, **options)
    trainer.train([{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}])
    trainer.save_adapter(folder)
    loaded = PeftModel.from_pretrained(copy.deepcopy(llama), folder).eval()
    model.eval()
    with torch.no_grad():
        tuned, expected, plain = (each(input_ids=ids).logits[:, -16:] for each in (loaded, model, llama.eval()))
    assert (tuned - expected).norm() < 1e-3 * expected.norm(), "another adapter was saved"
    assert (tuned - plain).norm() > 1e-5 * plain.norm(), "nothing was learned"
    ciphertune.session_of(model).close()
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


@pytest.mark.parametrize("tuner", TAUGHT)
def test_a_tuner_is_trained_and_loads_on_the_model(llama: Any, tmp_path: Path, tuner: str) -> None:
    found = learned(llama, section_of(tuner), tmp_path, allow_unused=tuner == "SHADOW")
    assert found["peft_type"] == tuner


@pytest.mark.parametrize("tuner", REFUSED)
def test_a_tuner_that_cannot_be_trained_is_refused_before_the_model_is_loaded(project: Path, tuner: str) -> None:
    (project / "model" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=rf"tuner: {tuner} cannot be trained here: \w+"):
        run(file_of(project, section_of(tuner)))


def test_a_prefix_is_learned_under_encryption(project: Path) -> None:
    losses = [run(file_of(project, section_of("PREFIX_TUNING"), to=to)).losses for to in ("clear", "mlwe")]
    assert losses[1] == pytest.approx(losses[0], abs=0.05)


def test_a_bundles_client_is_refused_what_reads_weights(project: Path) -> None:
    ciphertune.split(str(project / "model"), project / "bundle")
    to = "clear+zmq://127.0.0.1:1?insecure=1&allow_insecure=1"
    for tuner in (t for t in TAUGHT if refusal(t, bundle=True)):
        file = file_of(project, section_of(tuner), to=to, model="bundle/client")
        with pytest.raises(ConfigError, match=rf"tuner: {tuner} cannot be trained here: .*train from the whole model"):
            run(file)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"bias": "lora_only"},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"rank_pattern": {"q_proj": 2}},
        {"layers_to_transform": [1]},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_further_options_of_lora(llama: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    nested = {name: inline(value) if isinstance(value, dict) else toml(value) for name, value in options.items()}
    text = "{" + ", ".join(f"{name} = {value}" for name, value in nested.items()) + "}"
    found = learned(llama, f"[lora]\nr = 4\noptions = {text}", tmp_path)
    assert {name: found[name] for name in options} == options


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ('[tuner]\nname = "ia4"', r"tuner\.name: the installed peft has no tuner 'ia4'; did you mean 'ia3'"),
        ("[tuner]", r"tuner\.name is missing"),
        ('[tuner]\nname = "LoRA"', r"tuner\.name: LoRA has a section of its own"),
        ('[tuner]\nname = "ia3"\nr = 4', r"unknown key 'tuner\.r'"),
        ('[tuner]\nname = "loha"\noptions = {rank = 4}', r"tuner\.options: LOHA has no option 'rank'; Known: alpha"),
        ('[tuner]\nname = "loha"\noptions = {r = "four"}', r"tuner\.options\.r cannot be 'four': peft takes int"),
        ('[tuner]\nname = "loha"\noptions = {task_type = "X"}', r"tuner\.options\.task_type is set by the run"),
        ('[tuner]\nname = "adalora"\noptions = {init_r = 4}', "target_r must be below init_r"),
        ('[tuner]\nname = "prompt-tuning"', r"tuner\.options\.num_virtual_tokens is missing"),
        ('[tuner]\nname = "oft"\noptions = {r = 2, oft_block_size = 4}', r"tuner\.options: .*r"),
        ('[lora]\nr = 2\n[tuner]\nname = "ia3"', r"\[lora\] and \[tuner\] are two adapters"),
        ("[lora]\noptions = {lora_alpha = 4}", r"lora\.options\.lora_alpha is lora\.alpha here"),
        ("[lora]\noptions = {use_dora = true}", r"lora\.options\.use_dora: DoRA cannot be trained here"),
        ('[lora]\noptions = {init_lora_weights = "eva"}', "needs more than a file can give"),
        ("[lora]\noptions = {rslora = true}", r"lora\.options: LORA has no option 'rslora'; did you mean 'use_rslora'"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(project: Path, section: str, said: str) -> None:
    (project / "model" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=said):
        run(file_of(project, section))


def test_a_layer_that_is_not_there_and_a_prompt_without_room(project: Path) -> None:
    with pytest.raises(ConfigError, match=r"tuner\.options\.target_modules: no layer is called 'k_prj'; did you mean"):
        run(file_of(project, '[tuner]\nname = "loha"\noptions = {target_modules = ["k_prj"]}'))
    with pytest.raises(ConfigError, match=r"num_virtual_tokens and data\.length are 76 tokens together.* 64 at most"):
        run(file_of(project, '[tuner]\nname = "prompt-tuning"\noptions = {num_virtual_tokens = 60}'))


def test_all_linear_layers_for_any_tuner(llama: Any, tmp_path: Path) -> None:
    section = '[tuner]\nname = "loha"\noptions = {r = 2, target_modules = "all-linear"}'
    assert len(learned(llama, section, tmp_path)["target_modules"]) == 7


def test_adalora_divides_ranks_and_goes_on_as_if_never_stopped(project: Path) -> None:
    section = '[tuner]\nname = "adalora"\noptions = {init_r = 6, target_r = 2, tinit = 1, tfinal = 1}'
    more = 'checkpoint_dir = "ck"\ncheckpoint_every = 2\nkeep_checkpoints = 4\n'
    whole = run(file_of(project, section, more=more).rename(project / "whole.toml"))
    pattern = json.loads(Path(whole.adapter, "adapter_config.json").read_text())["rank_pattern"]
    kept = [sum(mask) for mask in pattern.values()]
    assert sum(kept) == 2 * len(kept), "as many ranks as asked for"
    assert len(set(kept)) > 1, "more where they matter more"
    final = load_file(Path(whole.adapter) / "adapter_model.safetensors")
    (project / "ck" / "checkpoint-4").rename(project / "last")
    again = run_training(load_config(project / "whole.toml"), resume=True)
    assert again.losses == whole.losses
    for name, tensor in load_file(Path(again.adapter) / "adapter_model.safetensors").items():
        assert torch.equal(tensor, final[name])
    file = file_of(project, "", model='model"\nadapter = "tuned/adapter')
    with pytest.raises(ConfigError, match="is of AdaLoRA, whose ranks were divided"):
        run(file)


@pytest.mark.parametrize("tuner", ["IA3", "PROMPT_TUNING"])
def test_an_adapter_of_another_tuner_is_trained_further(project: Path, tuner: str) -> None:
    first = run(file_of(project, section_of(tuner)))
    further = file_of(project, "", model='model"\nadapter = "tuned/adapter', to="simulation")
    config = load_config(further.rename(project / "further.toml"))
    if learns_prompts(tuner):
        with pytest.raises(ConfigError, match=f"is of {tuner}, which cannot be loaded here: its prompt is in front"):
            run_training(config, overwrite=True)
        return
    result = run_training(config, overwrite=True)
    assert result.evaluations[0]["eval_loss"] == pytest.approx(first.evaluations[-1]["eval_loss"], abs=0.03)


def test_a_plan_knows_the_layers(project: Path) -> None:
    assert read_run(load_config(file_of(project, ""))).targets == ("q_proj", "v_proj")
    assert read_run(load_config(file_of(project, section_of("PREFIX_TUNING")))).targets == ("",)
    named = '[tuner]\nname = "loha"\noptions = {target_modules = ["up_proj"]}'
    assert read_run(load_config(file_of(project, named))).targets == ("up_proj",)
    with pytest.raises(ConfigError, match="HIRA cannot be trained"):
        read_run(load_config(file_of(project, section_of("HIRA"))))


@pytest.mark.parametrize("tuner", ["ia3", "prompt-tuning", "prefix-tuning"])
def test_a_classifier(project: Path, tuner: str) -> None:
    rows = "".join(f"{'no' if n % 2 else 'high'} fever {n},{'well' if n % 2 else 'ill'}\n" for n in range(24))
    (project / "text.csv").write_text("text,label\n" + rows)
    options = {"num_virtual_tokens": 2} if tuner.startswith("p") else {}
    file = file_of(project, f'[tuner]\nname = "{tuner}"\noptions = {inline(options)}', top='task = "classification"\n')
    file.write_text(re.sub("text.txt", "text.csv", file.read_text()))
    if tuner == "prefix-tuning":
        with pytest.raises(ConfigError, match="PREFIX_TUNING cannot be trained here: it is for language models"):
            run(file)
        return
    assert "eval_accuracy" in run(file).evaluations[-1]
