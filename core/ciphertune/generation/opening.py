"""Open a model for use: load it, put its adapter on, outsource its layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from ciphertune.bundle.client import check_client, is_client_folder, load_client
from ciphertune.client.choice import choose
from ciphertune.client.session import Session
from ciphertune.data.render import use_template
from ciphertune.errors import ConfigError
from ciphertune.generation.adapters import refuse_other_model
from ciphertune.generation.source import ModelSource
from ciphertune.models.causal import refuse_encoder
from ciphertune.models.load import load_named_model, load_tokenizer
from ciphertune.models.skeleton import build
from ciphertune.outsourcing.calibration import calibration_under
from ciphertune.outsourcing.convert import outsource, session_of
from ciphertune.plugins.manager import plugin_manager
from ciphertune.training.lora import check_adapter, load_adapter


class OpenedModel:
    """A language model whose layers are at workers, ready for prompts. Use it in a ``with`` block, or close it.

    Args:
        source: what was opened.
        model: of transformers, in evaluation mode, without trainable parameters; an adapter is within its layers.
        tokenizer: its tokenizer.
        closing: what ends with it.

    Attributes:
        session: the session with the workers.
        positions: the most tokens that the model takes; None where its configuration does not say.
        vocabulary: tokens that the model has embeddings of.
    """

    def __init__(self, source: ModelSource, model: Any, tokenizer: Any, closing: contextlib.ExitStack) -> None:
        self.source = source
        self.model = model
        self.tokenizer = tokenizer
        self.session: Session = session_of(model)
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.positions = most if isinstance(most, int) and most > 0 else None
        self._closing = closing

    def close(self) -> None:
        """Close the session at the workers and leave the plugins. Idempotent."""
        self._closing.close()

    def __enter__(self) -> OpenedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_model(source: ModelSource, progress: Callable[[str], None] | None = None) -> OpenedModel:
    """Open a model for use. Bad input is found before a worker is asked for anything.

    Args:
        source: which one.
        progress: called with a line at every stage.

    Raises:
        ConfigError: the model, its tokenizer or the adapter cannot be loaded, or do not belong together.
        SelectionError, PluginError: about ``source.to`` or ``source.plugins``.
        CipherTuneError: whatever else ``outsource`` and ``load_client`` raise.
    """
    say = progress or (lambda line: None)
    with contextlib.ExitStack() as stack:
        stack.enter_context(plugin_manager().using(*source.plugins))
        if source.adapter is not None:
            check_adapter(source.adapter, None)
        say(f"Loading {source.name} …")
        bundle = is_client_folder(source.name)
        if not bundle and source.weights is not None:
            raise ConfigError(f"weights are named for the client's part of a bundle, and {source.name} is none")
        asked = ("layers", "embeddings", "convolutions", "calibration")
        chosen = {name: getattr(source, name) for name in asked}
        for name in (name for name, value in chosen.items() if bundle and value):
            raise ConfigError(f"{name}: the model was split with what was chosen then: leave it out")
        tokenizer, base = _load_bundle(source) if bundle else _load_model(source)
        calibration = None
        if not bundle:
            # Before the adapter, which private data shaped.
            calibration = calibration_under(choose(source.to).backend, base, tokenizer, source.calibration, say)
        model = base if source.adapter is None else load_adapter(base, source.adapter, None)
        if bundle:
            stack.callback(session_of(model).close)
        else:
            # With the adapter still trainable, which keeps its own layers here.
            outsource(
                model,
                source.to,
                source.layers,
                embeddings=source.embeddings,
                convolutions=source.convolutions,
                calibration=calibration,
            )
            stack.callback(session_of(model).close)
        base.requires_grad_(False)
        base.eval()
        opened = OpenedModel(source, base, tokenizer, stack.pop_all())
    say(f"Layers at {source.to}: {opened.session.security.summary}")
    return opened


def _load_model(source: ModelSource) -> tuple[Any, Any]:
    model, tokenizer = load_named_model(source.name, source.gguf_file)
    refuse_encoder(model, source.name)
    _prepare_tokenizer(tokenizer, source, model)
    return tokenizer, model


def _load_bundle(source: ModelSource) -> tuple[Any, Any]:
    check_client(Path(source.name))
    tokenizer = load_tokenizer(source.name)
    skeleton: nn.Module | None = None if source.adapter is None else build(Path(source.name))
    _prepare_tokenizer(tokenizer, source, skeleton)
    model = load_client(source.name, source.to, weights=source.weights)
    try:
        refuse_encoder(model, source.name, outsourced=True)
        if not hasattr(model, "generate"):
            raise ConfigError(f"{source.name!r} is a {type(model).__name__}, which generates no text")
    except BaseException:
        session_of(model).close()
        raise
    return tokenizer, model


def _prepare_tokenizer(tokenizer: Any, source: ModelSource, model: nn.Module | None) -> None:
    """Give the tokenizer its chat template; refuse an adapter whose shapes are not the model's."""
    use_template(tokenizer, source.chat_template_path)
    if source.adapter is not None and model is not None:
        refuse_other_model(source.adapter, model)
