"""A YAML file that ``trl sft --config`` takes, as the configuration of a run."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ciphertune._support.optional_imports import import_optional
from ciphertune.data.files import PROSE, ROWS, form
from ciphertune.data.tables import HUB
from ciphertune.errors import ConfigError
from ciphertune.runs.config import TrainConfig, parse_config, placed, read_text
from ciphertune.runs.results import Progress

# TRL's keys → where they stand here, and what TRL takes where they are not given.
_SAME: dict[str, tuple[str, str, Any]] = {
    "model_name_or_path": ("model", "name", None),
    "lora_r": ("lora", "r", 16),
    "lora_alpha": ("lora", "alpha", 32),
    "lora_dropout": ("lora", "dropout", 0.05),
    "dataset_train_split": ("data", "split", "train"),
    "dataset_text_field": ("data", "text_field", None),
    "max_length": ("data", "length", 1024),
    "per_device_train_batch_size": ("data", "batch_size", 8),
    "packing": ("data", "packing", False),
    "completion_only_loss": ("data", "completion_only_loss", None),
    "assistant_only_loss": ("data", "assistant_only_loss", False),
    "chat_template_path": ("data", "chat_template_path", None),
    "pad_to_multiple_of": ("data", "pad_to_multiple_of", None),
    "learning_rate": ("training", "learning_rate", 2e-5),
    "weight_decay": ("training", "weight_decay", 0.0),
    "warmup_steps": ("training", "warmup_steps", 0.0),
    "gradient_accumulation_steps": ("training", "accumulation", 1),
    "max_grad_norm": ("training", "max_grad_norm", 1.0),
    "output_dir": ("training", "output", "trainer_output"),
    "seed": ("training", "seed", 42),
    "eval_on_start": ("training", "eval_on_start", False),
}
# Keys that one line of this module each reads, since their values are not those of one setting here.
_READ = (
    *("dataset_name", "dataset_config", "datasets", "dataset_test_split", "lora_target_modules", "num_train_epochs"),
    *("max_steps", "lr_scheduler_type", "warmup_ratio", "save_strategy", "save_steps", "save_total_limit"),
    *("eval_strategy", "eval_steps", "use_peft", "use_rslora", "resume_from_checkpoint"),
)
# Keys that would change what is learned, with the values that ask for what is done here anyway.
_MATTERS: dict[str, tuple[Any, ...]] = {
    "optim": ("adamw_torch", "adamw_torch_fused", "adamw_hf"),
    "optim_args": (None, ""),
    "optim_target_modules": (None, []),
    "adam_beta1": (0.9,),
    "adam_beta2": (0.999,),
    "adam_epsilon": (1e-8,),
    "auto_find_batch_size": (False,),
    "dataloader_drop_last": (False,),
    "dataset_kwargs": (None, {}),
    "eos_token": (None,),
    "group_by_length": (False,),
    "label_smoothing_factor": (0, 0.0),
    "load_best_model_at_end": (False,),
    "lora_modules_to_save": (None, []),
    "lora_target_parameters": (None, []),
    "lora_task_type": ("CAUSAL_LM",),
    "load_in_4bit": (False,),
    "load_in_8bit": (False,),
    "loss_type": ("nll", "chunked_nll"),
    "lr_scheduler_kwargs": (None, {}),
    "model_init_kwargs": (None, {}),
    "model_revision": ("main", None),
    "neftune_noise_alpha": (None, 0),
    "packing_strategy": ("wrapped",),
    "pad_token": (None,),
    "router_aux_loss_coef": (None,),
    "shuffle_dataset": (True, False),
    "train_sampling_strategy": ("random",),
    "truncation_mode": ("keep_start",),
    "use_dora": (False,),
}
# Keys that say how TRL is to compute, report or store, and change nothing that is learned.
_ASIDE = (
    *("accelerator_config", "activation_checkpointing", "activation_checkpointing_kwargs"),
    *("activation_offloading", "attn_implementation", "average_tokens_across_devices", "batch_eval_metrics"),
    *("bf16", "bf16_full_eval", "bnb_4bit_quant_storage", "bnb_4bit_quant_type", "data_seed"),
    *("dataloader_in_order", "dataloader_multiprocessing_context", "dataloader_num_workers"),
    *("dataloader_persistent_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
    *("dataset_num_proc", "dataset_streaming", "ddp_backend", "ddp_broadcast_buffers", "ddp_bucket_cap_mb"),
    *("ddp_find_unused_parameters", "ddp_static_graph", "ddp_timeout", "debug", "deepspeed", "disable_tqdm"),
    *("do_eval", "do_predict", "do_train", "dtype", "enable_jit_checkpoint", "eval_accumulation_steps"),
    *("eval_delay", "eval_do_concat_batches", "eval_packing", "eval_use_gather_object", "fp16"),
    *("fp16_full_eval", "fsdp", "fsdp_config", "full_determinism", "gradient_checkpointing"),
    *("gradient_checkpointing_kwargs", "greater_is_better", "hub_always_push", "hub_model_id"),
    *("hub_private_repo", "hub_revision", "hub_strategy", "hub_token", "ignore_bias_buffers"),
    *("ignore_data_skip", "include_for_metrics", "include_num_input_tokens_seen", "label_names"),
    *("length_column_name", "liger_kernel_config", "local_rank", "log_level", "log_level_replica"),
    *("log_on_each_node", "logging_dir", "logging_first_step", "logging_nan_inf_filter", "logging_steps"),
    *("logging_strategy", "metric_for_best_model", "overwrite_output_dir", "padding_free"),
    *("parallelism_config", "per_device_eval_batch_size", "prediction_loss_only", "project", "push_to_hub"),
    *("remove_unused_columns", "report_to", "restore_callback_states_from_checkpoint", "run_name"),
    *("save_on_each_node", "save_only_model", "save_safetensors", "skip_memory_metrics", "tf32"),
    *("torch_compile", "torch_compile_backend", "torch_compile_mode", "torch_dtype", "torch_empty_cache_steps"),
    *("trackio_bucket_id", "trackio_space_id", "trackio_static_space_id", "trust_remote_code"),
    *("use_bnb_nested_quant", "use_cache", "use_cpu", "use_liger_kernel"),
)
_SCHEDULES = {"linear": "linear", "constant": "constant", "constant_with_warmup": "constant", "cosine": "cosine"}
_FORMATS = ("json", "csv", "parquet", "arrow", "text")
_OFF = ("no", "False")  # YAML reads a bare no as false


def is_trl(path: Path) -> bool:
    """Whether a file is YAML by its name."""
    return path.suffix.lower() in (".yaml", ".yml")


def load_trl(path: Path, progress: Progress | None = None) -> TrainConfig:
    """Read a YAML file of TRL's keys; paths in it are relative to the file, data to the working directory too.

    What it leaves out is what TRL takes. ``to`` is as in TOML.

    Args:
        path: of the file.
        progress: called with a line that names the keys which have no use here, and with one that names those by which
            the result will differ from TRL's.

    Raises:
        ConfigError: it cannot be read, asks for something that cannot be done, or a key is unknown.
    """
    yaml = import_optional("yaml", 'pip install "ciphertune[hf]"')
    text = read_text(path)
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" (line {mark.line + 1})"
        raise ConfigError(f"{path} is not YAML{where}") from None
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path} holds no keys: those of 'trl sft --config' are expected")
    try:
        sections, aside, differing = convert(content, path.parent)
        config = parse_config(sections)
    except ConfigError as error:
        raise ConfigError(f"{path}: {_in_their_words(str(error))}") from error
    if progress is not None and aside:
        progress(f"{path.name}: of no use here: {', '.join(aside)}")
    if progress is not None and differing:
        progress(f"{path.name}: not done here, so that the result will differ from TRL's: {', '.join(differing)}")
    return placed(config, path.parent)


def convert(content: Mapping[str, Any], folder: Path) -> tuple[dict[str, dict[str, Any]], list[str], list[str]]:
    """The sections of a configuration, the keys that have no use, and those by which the result will differ.

    Args:
        content: of the YAML file.
        folder: that holds it.

    Raises:
        ConfigError: a key is unknown, or a value cannot be followed.
    """
    aside, differing = _left_out(content)
    sections: dict[str, dict[str, Any]] = {"model": {}, "lora": {}, "data": {}, "training": {}}
    for key, (section, name, default) in _SAME.items():
        value = _number(content.get(key, default))
        if key in ("max_length", "model_name_or_path") and value is None:
            raise ConfigError(f"{key} is missing" if key not in content else f"{key} must be set here")
        if value is not None and not (key == "pad_to_multiple_of" and value == "auto"):
            sections[section][name] = value
    targets = content.get("lora_target_modules")
    if isinstance(targets, str):
        targets = targets.split()
    if targets:
        sections["lora"]["target_modules"] = "all-linear" if targets == ["all-linear"] else targets
    if content.get("use_rslora"):
        sections["lora"]["options"] = {"use_rslora": True}
    _data(content, sections["data"], folder)
    _training(content, sections["training"])
    if not content.get("use_peft"):
        differing.append("use_peft: false (adapters are trained, never all weights)")
    return sections, aside, differing


def _left_out(content: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    aside, differing = [], []
    for key, value in content.items():
        if key in _SAME or key in _READ:
            continue
        if key in _ASIDE:
            aside.append(key)
        elif key in _MATTERS:
            used = key != "packing_strategy" or content.get("packing")
            if used and _number(value) not in _MATTERS[key]:
                differing.append(f"{key}: {value}")
        else:
            near = difflib.get_close_matches(str(key), [*_SAME, *_READ, *_ASIDE, *_MATTERS], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ": leave it out if it is right"
            raise ConfigError(f"unknown key {key!r}{hint}")
    if content.get("packing") and "packing_strategy" not in content:
        differing.append("packing_strategy: bfd (examples are joined in order and cut, as by 'wrapped')")
    return aside, differing


def _data(content: Mapping[str, Any], data: dict[str, Any], folder: Path) -> None:
    name, configuration = content.get("dataset_name"), content.get("dataset_config")
    if content.get("datasets"):
        name, configuration = _of_mixture(content["datasets"], data)
    if not isinstance(name, str):
        raise ConfigError("dataset_name is missing: a file, a folder, or a data set of the hub")
    data["source"] = _source(name, configuration, folder)
    data["held_out"] = 0.0
    if str(content.get("eval_strategy", "no")) in _OFF:
        return
    # Of a file or a folder of them there is but one split.
    data["held_out"] = 0.1
    if content.get("dataset_test_split") is not None or data["source"].startswith(HUB):
        raise ConfigError(
            "eval_strategy: the test split cannot be read from here: set it to 'no', or save that split as a file and "
            "write a TOML configuration with data.eval_source"
        )


def _of_mixture(mixture: Any, data: dict[str, Any]) -> tuple[Any, Any]:
    """The path and the configuration of the one data set in a mixture."""
    if not isinstance(mixture, list) or len(mixture) != 1 or not isinstance(mixture[0], Mapping):
        raise ConfigError("datasets must be a list of one data set here: join the files of several")
    one = dict(mixture[0])
    path, configuration, files = one.pop("path", None), one.pop("name", None), one.pop("data_files", None)
    data["split"] = one.pop("split", data["split"])
    one.pop("columns", None)
    if isinstance(files, list) and len(files) == 1:
        files = files[0]
    if one or not isinstance(files, str | None):
        what = ", ".join(map(str, one)) or "data_files"
        raise ConfigError(f"datasets: {what} cannot be followed: name one file in data_files")
    if files is None or path in _FORMATS:
        return files or path, configuration
    return f"{path}/{files}", configuration


def _source(name: str, configuration: Any, folder: Path) -> str:
    for place in (folder / name, Path(name)):
        if place.exists():
            return str(place.resolve())
    owner, _, rest = name.partition("/")
    # A name that was meant for a file here is not sent to the hub.
    here = form(Path(name)) in (*ROWS, *PROSE) or (folder / owner).exists() or Path(owner).exists()
    if name.startswith((".", "/", "~")) or not rest or "/" in rest or here:
        raise ConfigError(f"dataset_name: there is no file or folder {name!r} beside the file, nor where you are")
    return f"{HUB}{name}" + (f"/{configuration}" if configuration else "")


def _training(content: Mapping[str, Any], training: dict[str, Any]) -> None:
    steps, epochs = _number(content.get("max_steps", -1)), _number(content.get("num_train_epochs", 3))
    if isinstance(steps, int) and steps > 0:
        training["steps"] = steps
    elif isinstance(epochs, float):
        if not epochs.is_integer():
            raise ConfigError(f"num_train_epochs: {epochs} is no whole number: set max_steps in its place")
        training["epochs"] = int(epochs)
    else:
        training["epochs"] = epochs
    schedule = content.get("lr_scheduler_type", "linear")
    if schedule not in _SCHEDULES:
        raise ConfigError(f"lr_scheduler_type: {schedule!r} is not done here; known: {', '.join(_SCHEDULES)}")
    training["schedule"] = _SCHEDULES[schedule]
    ratio = _number(content.get("warmup_ratio"))
    if ratio and not training["warmup_steps"]:
        training["warmup_steps"] = ratio
    if schedule == "constant":  # which has no warm-up in transformers either
        training["warmup_steps"] = 0.0
    saving = str(content.get("save_strategy", "steps"))
    if saving not in _OFF:
        training["checkpoint_dir"] = f"{training['output']}/checkpoints"
        training["keep_checkpoints"] = content.get("save_total_limit")
        if saving == "steps":
            training["checkpoint_every"] = _every(content.get("save_steps", 500), "save_steps")
    if str(content.get("eval_strategy", "no")) == "steps":
        training["eval_every"] = _every(content.get("eval_steps") or content.get("logging_steps", 500), "eval_steps")
    if content.get("resume_from_checkpoint"):
        raise ConfigError("resume_from_checkpoint: leave it out, and run 'ciphertune train FILE --resume'")


def _every(value: Any, key: str) -> int:
    steps = _number(value)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"{key} must be a whole number of steps here, not {value!r}")
    return steps


def _number(value: Any) -> Any:
    """A text that is a number as the number: YAML takes ``2e-4`` for a text."""
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    return value


def _in_their_words(message: str) -> str:
    """A message about a key of ours with the name that it has in the file."""
    for theirs, (section, ours, _) in _SAME.items():
        message = message.replace(f"{section}.{ours} ", f"{theirs} ").replace(f"{section}.{ours}:", f"{theirs}:")
    return message
