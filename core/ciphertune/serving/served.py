"""The model that a server answers with: its name, its tokenizer, and prompts as its tokens."""

from __future__ import annotations

from typing import Any

from ciphertune.errors import ConfigError
from ciphertune.serving.request_error import RequestError
from ciphertune.serving.requests import ChatRequest


class ServedModel:
    """A model, with what turns messages into its tokens.

    Args:
        name: by which requests ask for it.
        model: a causal language model of transformers.
        tokenizer: of transformers.

    Attributes:
        ends: tokens that end an answer.
        filler: token for padded places.
        positions: tokens of a prompt and its answer at most; None where the model has no limit.
        chats: whether the tokenizer has a chat template.
        calls: whether its template takes tools, and its answers can be read for calls.

    Raises:
        ConfigError: there is no tokenizer, or it has tokens that the model does not know.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        if tokenizer is None:
            raise ConfigError(f"the model {name!r} has no tokenizer: a server needs one")
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        config = base.config.get_text_config(decoder=True)
        if len(tokenizer) > config.vocab_size:
            raise ConfigError(
                f"the tokenizer has {len(tokenizer)} tokens and the model {name!r} knows {config.vocab_size}: "
                "they do not belong together"
            )
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        self.vocabulary = int(config.vocab_size)
        self.defaults = base.generation_config
        ends = self.defaults.eos_token_id
        ends = ends if isinstance(ends, (list, tuple)) else [ends]
        self.ends = frozenset(int(end) for end in (*ends, tokenizer.eos_token_id) if end is not None)
        pad = tokenizer.pad_token_id
        self.filler = int(pad) if pad is not None else min(self.ends, default=0)
        positions = getattr(config, "max_position_embeddings", None)
        self.positions = positions if isinstance(positions, int) and positions > 0 else None
        template = getattr(tokenizer, "chat_template", None)
        self.chats = template is not None
        self._form = _form(tokenizer, base)
        self.calls = self.chats and "tools" in str(template) and self._form is not None

    def chat_tokens(self, request: ChatRequest) -> list[int]:
        """The tokens of a conversation, up to where the answer begins. Raises ``RequestError``."""
        if not self.chats:
            raise RequestError("this model has no chat template: ask /v1/completions", code="no_chat_template")
        if request.tools and not self.calls:
            raise RequestError("this model cannot call tools", code="tools_unsupported", param="tools")
        try:
            rendered = self.tokenizer.apply_chat_template(
                request.messages,
                tools=request.tools or None,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
            )
        except Exception:
            # Of the template's own language or its words; it may repeat what the messages say.
            raise RequestError(
                "the model's chat template does not take these messages: look at the order of their roles",
                code="template_error",
                param="messages",
            ) from None
        return self._checked(rendered["input_ids"], "messages")

    def tokens(self, prompt: str | list[int]) -> list[int]:
        """The tokens of a prompt as it stands. Raises ``RequestError``."""
        return self._checked(self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt, "prompt")

    def room(self, tokens: int, limit: int, asked: int | None, param: str) -> int:
        """How long the answer to a prompt may become.

        Args:
            tokens: of the prompt.
            limit: the server's.
            asked: the request's, if it names one.
            param: the field that the prompt is in.

        Raises:
            RequestError: there is not so much room.
        """
        if asked is not None and asked > limit:
            raise RequestError(
                f"{asked} tokens are asked for, and answers of this server have at most {limit}",
                code="invalid_value",
                param="max_tokens",
            )
        if self.positions is None:
            return asked or limit
        left = self.positions - tokens
        if left < (asked or 1):
            raise RequestError(
                f"the model has {self.positions} positions, and the prompt takes {tokens} of them"
                + (f" where {asked} are asked for" if asked is not None and left > 0 else ""),
                code="context_length_exceeded",
                param=param,
            )
        return asked or min(limit, left)

    def read_calls(self, text: str, prompt: list[int], tools: list[dict[str, Any]]) -> dict[str, Any]:
        """A whole answer as a message: ``content``, and ``tool_calls`` if it has some."""
        prefix = self.tokenizer.decode(prompt)
        found: dict[str, Any] = self.tokenizer.parse_response(text, self._form, prefix=prefix, tools=tools)
        return found

    def _checked(self, tokens: list[int], param: str) -> list[int]:
        if not tokens:
            raise RequestError("the prompt is empty", code="empty_prompt", param=param)
        if not all(0 <= token < self.vocabulary for token in tokens):
            raise RequestError(f"the model has {self.vocabulary} tokens", code="invalid_value", param=param)
        return list(tokens)


def _form(tokenizer: Any, model: Any) -> Any:
    """How transformers reads calls out of an answer; None where it does not know.

    Beside what tokenizers say themselves, transformers' own server knows of some families. That function is internal.
    """
    try:
        from transformers.cli.serving.utils import get_response_template
    except ImportError:
        return getattr(tokenizer, "response_template", None)
    return get_response_template(tokenizer, model)
