"""The task of a language model: texts, conversations, answers to prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ciphertune.data.examples import Columns, Example, examples_of, form_of
from ciphertune.data.render import Renderer, Tokens, check_loss, use_template
from ciphertune.data.sequences import Collator, Cut, apart, joined, padding
from ciphertune.data.splitting import split
from ciphertune.errors import ConfigError
from ciphertune.models.causal import refuse_encoder
from ciphertune.models.load import load_named_model, load_tokenizer
from ciphertune.runs.config import TrainConfig
from ciphertune.runs.task import Batches, load_bundle, read_source

_WHOLE = {
    "text": "texts",
    "messages": "conversations",
    "completion": "prompts with completions",
    "instruction": "instructions with answers",
}


class LanguageTask:
    """Reads the data, and says what is wrong with it before the model is loaded.

    Args:
        config: of the run.

    Raises:
        ConfigError: the data cannot be read, or is no data for a language model.
    """

    peft_task = None
    metric = None

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        data = config.data
        columns = Columns(data.text_field, data.prompt_field, data.completion_field)
        read = read_source(data, data.source)
        self.form = "text" if read.prose else form_of(read.rows, columns)
        check_loss(self.form, data.completion_only_loss, data.assistant_only_loss)
        self.one_text = read.prose and len(read.rows) == 1
        self.examples = examples_of(read.rows, self.form, Columns() if read.prose else columns)
        self.held: list[Example] = []
        if data.eval_source is not None:
            other = read_source(data, data.eval_source)
            form = "text" if other.prose else form_of(other.rows, columns)
            self.held = examples_of(other.rows, form, Columns() if other.prose else columns)
            if form != self.form:
                raise ConfigError(f"data.eval_source holds {_WHOLE[form]}, and data.source {_WHOLE[self.form]}")
        elif data.held_out > 0 and len(self.examples) > 1:
            self.examples, self.held = split(self.examples, data.held_out)

    def load(self) -> tuple[Any, Any]:
        """A causal language model in float32, or the model of a bundle, and the tokenizer. Raises ``ConfigError``."""
        model = self.config.model
        base = load_bundle(self.config)
        bundle = base is not None
        if bundle:
            tokenizer = load_tokenizer(model.name)
        else:
            base, tokenizer = load_named_model(model.name, model.gguf_file)
        refuse_encoder(base, model.name, outsourced=bundle)
        base.config.use_cache = False
        use_template(tokenizer, self.config.data.chat_template_path)
        return base, tokenizer

    def trained_whole(self) -> list[str]:
        """None: the head of a language model has adapters like any other layer, or stays as it is."""
        return []

    def batches(self, tokenizer: Any) -> Batches:
        """Sequences with the labels that are learned. Raises ``ConfigError``."""
        data = self.config.data
        render = Renderer(
            tokenizer, self.form, completion_only=data.completion_only_loss, assistant_only=data.assistant_only_loss
        )
        train, cut = self._fitted([render(example) for example in self.examples])
        held, cut_too = self._fitted([render(example) for example in self.held])
        if self.one_text and not self.held and data.held_out > 0:
            keep = len(train) - round(len(train) * data.held_out)
            train, held = train[:keep], train[keep:]
        if not train and held:
            raise ConfigError("data.held_out leaves no sequence to train on: lower it, or data.length")
        if not train and cut.left_over:
            raise ConfigError(f"the text does not fill one sequence of {data.length} tokens: lower data.length")
        if not train:
            raise ConfigError(
                f"no token that is learned lies within the first {data.length} tokens of any example (the longest has "
                f"{cut.longest}): raise data.length"
            )
        return Batches(
            train, held, Collator(padding(tokenizer), data.pad_to_multiple_of), self._notes(render, cut, cut_too)
        )

    def _fitted(self, examples: Sequence[Tokens]) -> tuple[list[Tokens], Cut]:
        packing = self.form == "text" if self.config.data.packing is None else self.config.data.packing
        return (joined if packing else apart)(examples, self.config.data.length)

    def _notes(self, render: Renderer, *cuts: Cut) -> list[str]:
        learned = "whole"
        if render.assistant_only:
            learned = "from the assistant's turns alone"
        elif render.completion_only:
            learned = "from the completions alone"
        notes = [f"{len(self.examples) + len(self.held)} {_WHOLE[self.form]}, learned {learned}"]
        names = ("to train on: ", "held out: ")
        told = [(name, cut.told(self.config.data.length)) for name, cut in zip(names, cuts, strict=True)]
        # Of joined texts it is but the rest of the last sequence.
        notes += [
            name + text for (name, text), cut in zip(told, cuts, strict=True) if text and (cut.shortened or cut.empty)
        ]
        if render.moved:
            notes.append(
                f"{render.moved} prompts have other tokens with the completion behind them than alone, and are learned "
                "from where they part: end prompts with a line feed or leave their last space to the completion"
            )
        return notes
