"""A tiny Llama in GGUF form with its tokenizer, its linear weights quantized as people get them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from torch import Tensor, nn

from ciphertune.training.gguf_adapter import permuted

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, POSITIONS = 64, 96, 2, 4, 2, 128


def write(file: Path, seed: int = 0) -> None:
    """Write the model, with random weights."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", *letters, "Ġt"]
    writer = GGUFWriter(file, "llama")
    writer.add_name("Tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3, *([1] * (len(tokens) - 1))])
    writer.add_token_merges(["Ġ t"])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id, writer.add_pad_token_id):
        add(0)
    generator = torch.Generator().manual_seed(seed)

    def add_weight(name: str, rows: int, columns: int, heads: int = 0) -> None:
        weight: Tensor = nn.init.normal_(torch.empty(rows, columns), std=0.3, generator=generator)
        weight = permuted(weight, heads) if heads else weight
        packed: Any = quants.quantize(weight.contiguous().numpy(), GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=GGMLQuantizationType.Q8_0)

    kv = HIDDEN // HEADS * KV_HEADS
    add_weight("token_embd", len(tokens), HIDDEN)
    for block in (f"blk.{i}" for i in range(LAYERS)):
        add_weight(f"{block}.attn_q", HIDDEN, HIDDEN, HEADS)
        add_weight(f"{block}.attn_k", kv, HIDDEN, KV_HEADS)
        add_weight(f"{block}.attn_v", kv, HIDDEN)
        add_weight(f"{block}.attn_output", HIDDEN, HIDDEN)
        add_weight(f"{block}.ffn_gate", INNER, HIDDEN)
        add_weight(f"{block}.ffn_up", INNER, HIDDEN)
        add_weight(f"{block}.ffn_down", HIDDEN, INNER)
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{block}.{norm}.weight", torch.ones(HIDDEN).numpy())
    writer.add_tensor("output_norm.weight", torch.ones(HIDDEN).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
