"""Use of a language model whose layers are at workers: answers to prompts, conversations, evaluation."""
