"""What small models of some architectures need that no rule gives: sizes that fit, and inputs of their own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Inputs = Callable[[Any], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a small model of an architecture is made and called.

    Attributes:
        config: what its configuration says in place of what the rule makes; dictionaries are merged, but for those
            with a ``model_type``, which stand for the whole part.
        inputs: what ``forward`` gets, from the configuration; None for inputs by rule.
        factor: what features are divided by; None to try several.
        first: as ``config``, merged before sizes are divided.
        model: class to look at in place of the architecture's own, which has no ``forward``.
        train: whether the model computes only as it trains.
        drawn: whether weights and codebooks are drawn anew, where those that a class makes give nothing but zeros.
        made: what its configuration is made with, where it is not made with its defaults.
    """

    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    inputs: Inputs | None = None
    factor: int | None = None
    first: dict[str, Any] = dataclasses.field(default_factory=dict)
    model: str = ""
    train: bool = False
    drawn: bool = False
    made: dict[str, Any] = dataclasses.field(default_factory=dict)


PLAIN = Recipe()


def merged(stated: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
    """A configuration as a dictionary, with what is said in place of what it states."""
    made = dict(stated)
    for key, value in said.items():
        old = made.get(key)
        made[key] = (
            merged(old, value)
            if isinstance(value, dict) and isinstance(old, dict) and value and ("model_type" not in value)
            else value
        )
    return made


def floats(*shape: int) -> Tensor:
    """Values without a pattern that a layer could lose."""
    return torch.linspace(0, 40, math.prod(shape)).sin().reshape(shape)


def ids(rows: int = 2, length: int = 8) -> Tensor:
    """Token ids above the special ones, below 32."""
    return torch.arange(rows * length).reshape(rows, length) % 12 + 16


def ones(*shape: int) -> Tensor:
    """A mask that leaves everything."""
    return torch.ones(shape, dtype=torch.int64)


def patches(config: Any, temporal: int = 1, down: int = 4, across: int = 4) -> Tensor:
    """A picture cut into patches: a row each."""
    channels = getattr(config, "in_channels", None) or getattr(config, "num_channels", None) or 3
    return floats(down * across, channels * temporal * int(config.patch_size) ** 2)


def grid(down: int = 4, across: int = 4) -> Tensor:
    """Patches of one picture over time, down and across."""
    return torch.tensor([[1, down, across]])


def _tower(temporal: int = 1, name: str = "pixel_values", of_grid: str = "grid_thw") -> Inputs:
    return lambda config: {name: patches(config, temporal), of_grid: grid()}


def _picture(side: int = 64, across: int | None = None, /, **more: Tensor) -> Inputs:
    return lambda config: {"pixel_values": floats(2, 3, side, across or side), **more}


def _series(config: Any) -> dict[str, Any]:
    past = config.context_length + max(config.lags_sequence)
    ahead = config.prediction_length
    return {
        "past_values": floats(2, past) + 2,
        "past_time_features": floats(2, past, 2),
        "past_observed_mask": torch.ones(2, past),
        "future_values": floats(2, ahead) + 2,
        "future_time_features": floats(2, ahead, 2),
    }


def _speech(bins: int = 128, frames: int = 100, mask: str = "", swapped: bool = False, **more: Tensor) -> Inputs:
    def made(config: Any) -> dict[str, Any]:
        values = floats(2, bins, frames) if swapped else floats(2, frames, bins)
        return {"input_features": values, **more} | ({mask: ones(2, frames)} if mask else {})

    return made


def _with_image(config: Any) -> dict[str, Any]:
    text = torch.cat([torch.full((2, config.num_query_tokens), config.image_token_index), ids()], 1)
    side = config.vision_config.image_size
    made = {"pixel_values": floats(2, 3, side, side), "input_ids": text}
    return made | ({} if config.model_type == "blip-2" else {"qformer_input_ids": ids()})


def _robot(config: Any) -> dict[str, Any]:
    vision = config.vlm_config.vision_config
    image = torch.full((2, (vision.image_size // vision.patch_size) ** 2), config.vlm_config.image_token_id)
    return {
        "action_embeds": floats(2, 4, config.dit_config.hidden_size),
        "input_ids": torch.cat([image, ids()], 1),
        "pixel_values": floats(2, 1, 3, vision.image_size, vision.image_size),
        "pixel_attention_mask": ones(2, 1),
        "attention_mask": ones(2, image.shape[1] + 8),
    }


def _assistant(config: Any) -> dict[str, Any]:
    """What a model that drafts for another gets from it: hidden states, keys and values."""
    text = config.text_config
    shared = floats(2, text.num_key_value_heads, 8, text.head_dim)
    return {
        "inputs_embeds": floats(2, 1, 2 * config.backbone_hidden_size),
        "position_ids": torch.full((2, 1), 7),
        "shared_kv_states": dict.fromkeys(("full_attention", "sliding_attention"), (shared, shared)),
    }


RESNET = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1],
    "out_features": ["stage2", "stage3", "stage4"],
}  # fmt: skip
HGNET = {
    "model_type": "hgnet_v2", "embedding_size": 8, "depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 64, 64],
    "stem_channels": [3, 8, 8], "stage_in_channels": [8, 16, 32, 64], "stage_mid_channels": [8, 8, 8, 8],
    "stage_out_channels": [16, 32, 64, 64], "stage_num_blocks": [1, 1, 1, 1], "stage_numb_of_layers": [2, 2, 2, 2],
    "out_features": ["stage2", "stage3", "stage4"],
}  # fmt: skip
SWIN = {
    "model_type": "swin", "image_size": 64, "patch_size": 4, "embed_dim": 8, "depths": [1, 1, 1, 1],
    "num_heads": [1, 2, 2, 2], "window_size": 2, "out_features": ["stage2", "stage3", "stage4"],
}  # fmt: skip
LCNET: dict[str, Any] = {
    "block_configs": [[[3, 8, 8, 1, True]], *([[3, n, 16, 2, False]] for n in (8, 16, 16))], "stem_channels": [3, 8, 8],
    "stage_out_channels": [8, 16, 16, 16], "depths": [1, 1, 1, 1],
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}  # fmt: skip
FULL_SWIN = SWIN | {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
_DETR = Recipe({"backbone_config": RESNET, "num_queries": 5}, _picture(), 8)
_GROUNDING = Recipe({"backbone_config": SWIN, "num_queries": 5}, _picture(input_ids=ids()), 8)
_TWO_STAGE: dict[str, Any] = {
    "encoder_in_channels": [32, 64, 64], "num_queries": 5, "num_denoising": 0, "encoder_hidden_dim": 32,
    "d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "decoder_in_channels": [32, 32, 32], "decoder_layers": 2, "head_dim": 8,
}  # fmt: skip
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_TIMES = Recipe(
    {"prediction_length": 4, "context_length": 8, "num_time_features": 2, "feature_size": 11}, _series, factor=2
)
_RATIOS = (("long", 7), ("mid", 5), ("short", 3))
_CODEC = {"upsample_groups": 32}
_RT_DETR_RESNET: dict[str, Any] = {
    "model_type": "rt_detr_resnet",
    "embedding_size": 8,
    "hidden_sizes": [16, 32, 64, 64],
    "depths": [1, 1, 1, 1],
    "layer_type": "bottleneck",
    "out_features": ["stage2", "stage3", "stage4"],
}
_SAM_VISION: dict[str, Any] = {
    "image_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "output_channels": 32,
    "window_size": 2,
    "global_attn_indexes": [1],
    "mlp_dim": 32,
    "num_pos_feats": 16,
}
_SAM_PARTS: dict[str, Any] = {
    "prompt_encoder_config": {"hidden_size": 32, "image_size": 64, "patch_size": 16, "image_embedding_size": 4},
    "mask_decoder_config": {"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 4, "iou_head_hidden_dim": 32},
}  # fmt: skip
_POINTS = {"input_points": torch.tensor([[[[10.0, 20.0]]], [[[30.0, 5.0]]]]), "input_labels": ones(2, 1, 1)}
_HIERA: dict[str, Any] = {
    "model_type": "sam2_hiera_det_model", "hidden_size": 8, "image_size": [64, 64], "blocks_per_stage": [1, 1, 2, 1],
    "embed_dim_per_stage": [8, 16, 32, 64], "num_attention_heads_per_stage": [1, 2, 2, 2],
    "window_size_per_stage": [4, 4, 4, 2], "global_attention_blocks": [3],
    "window_positional_embedding_background_size": [4, 4],
}  # fmt: skip
_SAM2_VISION: dict[str, Any] = {
    "backbone_config": _HIERA, "backbone_channel_list": [64, 32, 16, 8],
    "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]], "fpn_hidden_size": 32,
}  # fmt: skip

_DOTS3 = Recipe(
    {
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 12, "v_head_dim": 8, "per_layer_config": {},
        "num_hidden_layers": 2, "layer_types": ["indexed_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse"],
    },
    factor=16,
)  # fmt: skip
_INDEXER = ("n_heads", "kv_heads", "head_dim", "budget", "compress_ratio")
_QWEN4 = Recipe(
    {f"indexer_{name}": n for name, n in zip(_INDEXER, (2, 1, 16, 4, 2), strict=True)},
)
_SMALL_DINO: dict[str, Any] = {
    "model_type": "dinov2", "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 1, "patch_size": 4,
    "image_size": 16,
}  # fmt: skip

RECIPES: dict[str, Recipe] = {
    "align": Recipe(
        {"projection_dim": 640, "vision_config": {"image_size": 64, "num_block_repeats": [1] * 7}},
        _picture(input_ids=ids()),
        16,
    ),
    "apertus1p5": Recipe(
        {
            "audio_config": {"decoder_attention_num_groups": 4, "codebook_size": 16},
            "vision_config": {"codebook_size": 16, "base_channels": 32, "channel_multiplier": [1, 1, 2, 2, 2]},
            "image_token_offset": 64,
            "audio_token_offset": 80,
        }
    ),
    "audioflamingo3_encoder": Recipe(
        {"max_source_positions": 50}, _speech(mask="input_features_mask", swapped=True), 16
    ),
    "autoformer": Recipe(_TIMES.config | {"label_length": 2, "moving_average": 3}, _series, 2),
    "bark": Recipe(model="BarkSemanticModel"),
    "blip-2": Recipe(
        {"num_query_tokens": 4, "image_token_index": 3, "vision_config": {"num_attention_heads": 4}}, _with_image
    ),
    "blip_2_qformer": Recipe(
        {},
        lambda c: {
            "query_embeds": floats(2, 4, c.hidden_size),
            "encoder_hidden_states": floats(2, 6, c.encoder_hidden_size),
        },
    ),
    "blt": Recipe({"encoder_hash_byte_group_vocab": 100}),
    "canary": Recipe({}, _speech(decoder_input_ids=ids())),
    "chameleon": Recipe({"vocabulary_map": {"<image>": 3}}),
    "clap": Recipe(
        {
            "projection_dim": 32,
            "text_config": {"projection_dim": 32},
            "audio_config": {
                "patch_embeds_hidden_size": 8,
                "hidden_size": 16,
                "projection_dim": 32,
                "depths": [1, 1],
                "num_attention_heads": [1, 2],
                "spec_size": 64,
                "num_mel_bins": 16,
                "window_size": 2,
                "num_hidden_layers": 2,
            },
        },
        lambda c: {
            "input_ids": ids(),
            "input_features": floats(2, 1, 64, 16),
            "is_longer": torch.zeros(2, 1, dtype=torch.bool),
        },
        16,
    ),
    "clvp": Recipe({}, lambda c: {"input_ids": ids(), "input_features": floats(2, 80, 20)}),
    "cohere_asr": Recipe({}, _speech(decoder_input_ids=ids())),
    "cohere_compass": Recipe(
        {"text_config": {"rope_parameters": {"full_attention": _PLAIN_ROPE, "sliding_attention": _PLAIN_ROPE}}}
    ),
    "cohere_compass_text": Recipe(
        {"rope_parameters": {"full_attention": _PLAIN_ROPE, "sliding_attention": _PLAIN_ROPE}}
    ),
    "conditional_detr": _DETR,
    "dab-detr": _DETR,
    "deformable_detr": _DETR,
    "detr": _DETR,
    "table-transformer": _DETR,
    "cosmos3_edge_vision": Recipe({}, _tower()),
    "csm": Recipe({"codec_config": _CODEC}, lambda c: {"input_ids": ids(2, 8 * c.num_codebooks).reshape(2, 8, -1)}, 16),
    "d_fine": Recipe(_TWO_STAGE | {"backbone_config": HGNET}, _picture(), 16),
    "decision_transformer": Recipe(
        {},
        lambda c: {
            "states": floats(2, 5, c.state_dim),
            "actions": floats(2, 5, c.act_dim),
            "rewards": floats(2, 5, 1),
            "returns_to_go": floats(2, 5, 1),
            "timesteps": ids(2, 5),
            "attention_mask": ones(2, 5),
        },
        2,
    ),
    "deepseek_v2": Recipe({"moe_intermediate_size": 32}),
    "deimv2": Recipe(_TWO_STAGE | {"backbone_config": HGNET}, _picture(), 16),
    "depth_pro": Recipe(
        {
            "patch_size": 16,
            "fusion_hidden_size": 16,
            "intermediate_hook_ids": [1, 0],
            "intermediate_feature_dims": [10, 8],
            "scaled_images_ratios": [0.5, 1.0],
            "scaled_images_overlap_ratios": [0.0, 0.2],
            "scaled_images_feature_dims": [12, 12],
            "image_model_config": _SMALL_DINO,
            "patch_model_config": _SMALL_DINO,
            "fov_model_config": _SMALL_DINO,
        },
        _picture(),
        16,
    ),
    "dia": Recipe({}, lambda c: {"input_ids": ids(), "decoder_input_ids": ids(2, 8 * 9).reshape(2, 8, 9)}),
    "dory": Recipe(
        {
            "num_hidden_layers": 6,
            "n_input_layers": 2,
            "n_recurrent_layers": 2,
            "n_output_layers": 2,
            "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp", "sliding_attention", "mlp"],
        },
        None,
        16,
    ),
    "dots1": Recipe({"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1}),
    "omdet-turbo": Recipe(
        {
            "backbone_config": SWIN,
            "encoder_in_channels": [16, 32, 64],
            "num_queries": 5,
            "apply_layernorm_after_vision_backbone": False,
            "text_projection_in_dim": 32,
            "text_projection_out_dim": 32,
            "vision_features_channels": [16, 16, 16],
        },
        lambda c: {
            "pixel_values": floats(1, 3, 64, 64),
            "classes_input_ids": ids(),
            "classes_attention_mask": ones(2, 8),
            "tasks_input_ids": ids(1),
            "tasks_attention_mask": ones(1, 8),
            "classes_structure": torch.tensor([2]),
        },
        16,
    ),
    "efficientloftr": Recipe(
        {"stage_num_blocks": [1, 1, 1, 1]}, lambda c: {"pixel_values": floats(1, 2, 3, 64, 64)}, 1
    ),
    "efficientnet": Recipe({"image_size": 64, "num_block_repeats": [1] * 7}, _picture(), 1, drawn=True),
    "esm": Recipe({"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32}),
    "falcon_h1": Recipe({"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64}, None, 16),
    "fun_asr_nano_encoder": Recipe({}, _speech(560, 20, "input_features_mask")),
    "gemma3n_audio": Recipe(
        {}, lambda c: {"audio_mel": floats(2, 50, 128), "audio_mel_mask": torch.zeros(2, 50, dtype=torch.bool)}
    ),
    "gemma3n_text": Recipe(
        {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "intermediate_size": [64] * 4,
            "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
            "vocab_size_per_layer_input": 128,
        },
        None,
        16,
    ),
    "gemma4_audio": Recipe({}, _speech(128, 50)),
    "gemma4_vision": Recipe(
        {},
        lambda c: {
            "pixel_values": floats(2, 36, 3 * c.patch_size**2),
            "pixel_position_ids": torch.cartesian_prod(torch.arange(6), torch.arange(6)).repeat(2, 1, 1),
        },
    ),
    "glm_image_vision": Recipe({}, _tower()),
    "glmasr_encoder": Recipe({}, _speech(swapped=True)),
    "granite_speech5_ctc": Recipe({}, _speech(320, 32)),
    "granite_speech5_encoder": Recipe({}, _speech(320, 32)),
    "granitemoehybrid": Recipe({"layer_types": ["linear_attention", "full_attention"]}),
    "grounding-dino": _GROUNDING,
    "mm-grounding-dino": _GROUNDING,
    "hunyuan_vl_vision": Recipe({}, _tower()),
    "hy_v4_vl": Recipe({"text_config": {"rope_parameters": {"mrope_section": [1, 1, 0]}}}),
    "hy_v4_vl_text": Recipe({"rope_parameters": {"mrope_section": [1, 1, 0]}}),
    "hy_v4_vl_vision": Recipe({}, _tower()),
    "idefics": Recipe(
        {"vision_config": {"image_size": 28}},
        lambda c: {
            "input_ids": ids(),
            "pixel_values": floats(2, 1, 3, 28, 28),
            "image_attention_mask": ones(2, 8, 1),
        },
    ),
    "informer": _TIMES,
    "time_series_transformer": _TIMES,
    "inkling2_vision": Recipe({}, lambda c: {"pixel_values": floats(16, 40, 40, 3), "image_grid_thw": grid()}),
    "instructblip": Recipe(
        {"num_query_tokens": 4, "image_token_index": 3, "vision_config": {"num_attention_heads": 4}}, _with_image
    ),
    "instructblipvideo": Recipe(
        {"num_query_tokens": 4, "video_token_index": 3, "vision_config": {"num_attention_heads": 4}},
        lambda c: {
            "pixel_values": floats(2, 4, 3, 56, 56),
            "qformer_input_ids": ids(),
            "input_ids": torch.cat([torch.full((2, 16), 3), ids()], 1),
        },
    ),
    "kimi_k25_vision": Recipe(
        {"pos_emb_width": 64}, lambda c: {"pixel_values": floats(16, 3, 14, 14), "grid_thw": grid()}, 16
    ),
    "kosmos-2": Recipe(
        {"latent_query_num": 4},
        lambda c: {
            "input_ids": ids(),
            "pixel_values": floats(2, 3, c.vision_config.image_size, c.vision_config.image_size),
            "image_embeds_position_mask": torch.tensor([[1] * 4 + [0] * 4] * 2),
        },
    ),
    "kyutai_speech_to_text": Recipe(
        {"codec_config": _CODEC}, lambda c: {"input_ids": ids(2, 8 * 33).reshape(2, 8, 33)}, 16
    ),
    "lasr_ctc": Recipe({}, _speech()),
    "lfm2_moe": Recipe({"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3}),
    "lfm3_vl_vision": Recipe({}, _tower(2)),
    "lightglue": Recipe({}, lambda c: {"pixel_values": floats(1, 2, 3, 64, 64)}, 1),
    "lxmert": Recipe(
        {"l_layers": 2, "x_layers": 1, "r_layers": 1},
        lambda c: {
            "input_ids": ids(),
            "visual_feats": floats(2, 4, c.visual_feat_dim),
            "visual_pos": floats(2, 4, 4),
        },
        16,
    ),
    "mask2former": Recipe({"backbone_config": FULL_SWIN, "num_queries": 5, "train_num_points": 16}, _picture(), 8),
    "mgp-str": Recipe({"num_bpe_labels": 40, "num_wordpiece_labels": 40}, _picture(32, 128), 16),
    "mimi": Recipe(_CODEC, lambda c: {"input_values": floats(2, 1, 3840)}, 16),
    "mimi_decoder": Recipe(_CODEC, lambda c: {"latents": floats(2, c.hidden_size, 8)}, 16),
    "mlcd": Recipe({"hidden_size": 64, "num_attention_heads": 4, "image_size": 56}, _picture(56), 16),
    "mlcd_vision_model": Recipe({"hidden_size": 64, "num_attention_heads": 4, "image_size": 56}, _picture(56), 16),
    "mobilebert": Recipe({}, None, 1),
    "muse_glimmer_vision": Recipe({}, _tower(2)),
    "muse_spark_vision": Recipe({}, _tower(2)),
    "musicgen": Recipe({}, lambda c: {"input_ids": ids(8, 8)}),
    "musicgen_melody": Recipe({}, lambda c: {"input_ids": ids(8, 8)}),
    "neucodec": Recipe(
        {"semantic_model_config": {"feature_projection_input_dim": 160}},
        lambda c: {"input_values": floats(1, 1, 3200), "input_features": floats(1, 10, 160)},
        16,
        drawn=True,
    ),
    "oneformer": Recipe(
        {"backbone_config": FULL_SWIN, "num_queries": 20, "train_num_points": 16, "text_encoder_vocab_size": 100},
        _picture(task_inputs=ids(2, 77)),
        8,
    ),
    "patchtsmixer": Recipe({}, lambda c: {"past_values": floats(2, 32, 1)}, 1),
    "patchtst": Recipe({}, lambda c: {"past_values": floats(2, 32, 1)}, 4),
    "pe_audio_encoder": Recipe({}, lambda c: {"input_values": floats(2, 1, 3840 * 4)}),
    "perceiver": Recipe(
        {"num_latents": 8, "num_self_attends_per_block": 2}, lambda c: {"inputs": floats(2, 8, c.d_model)}, 16
    ),
    "pocket_tts_audio_tokenizer": Recipe(_CODEC, lambda c: {"input_values": floats(2, 1, 3840)}, 16),
    "pocket_tts_audio_tokenizer_decoder": Recipe(_CODEC, lambda c: {"latents": floats(2, c.latent_dim, 8)}, 16),
    "pp_doclayout_v3": Recipe(
        _TWO_STAGE
        | {
            "backbone_config": HGNET | {"out_features": ["stage1", "stage2", "stage3", "stage4"]},
            "mask_feature_channels": [16, 16],
            "x4_feat_dim": 16,
            "num_prototypes": 8,
        },
        _picture(),
        16,
    ),
    "pp_doclayout_v4": Recipe(_TWO_STAGE | {"backbone_config": HGNET, "hidden_size": 32}, _picture(), 16),
    "qwen3_asr_encoder": Recipe(
        {}, lambda c: {"input_features": floats(2, 128, 100), "input_features_mask": ones(2, 100)}
    ),
    "reformer": Recipe(
        {
            "axial_pos_shape": [4, 4],
            "axial_pos_embds_dim": [16, 16],
            "hidden_size": 32,
            "num_attention_heads": 2,
            "attn_layers": ["local", "lsh"],
            "num_hidden_layers": 2,
            "is_decoder": True,
            "local_attn_chunk_length": 4,
            "lsh_attn_chunk_length": 4,
            "num_buckets": 2,
            "hidden_dropout_prob": 0.0,
            "local_attention_probs_dropout_prob": 0.0,
            "lsh_attention_probs_dropout_prob": 0.0,
        },
        lambda c: {"input_ids": ids(2, 16)},
        16,
        train=True,
    ),
    "rt_detr": Recipe(
        _TWO_STAGE | {"backbone_config": _RT_DETR_RESNET},
        _picture(),
        16,
    ),
    "rt_detr_v2": Recipe(
        _TWO_STAGE | {"backbone_config": _RT_DETR_RESNET},
        _picture(),
        16,
    ),
    "sam": Recipe(
        _SAM_PARTS | {"vision_config": _SAM_VISION},
        _picture(**_POINTS),
        16,
    ),
    "sam_hq": Recipe(
        _SAM_PARTS
        | {"vision_config": _SAM_VISION}
        | {"mask_decoder_config": _SAM_PARTS["mask_decoder_config"] | {"vit_dim": 32}},
        _picture(**_POINTS),
        16,
    ),
    "sam2": Recipe(_SAM_PARTS | {"vision_config": _SAM2_VISION}, _picture(**_POINTS), 16),
    "sam2_hiera_det_model": Recipe({k: v for k, v in _HIERA.items() if k != "model_type"}, _picture(), 16),
    "sam2_vision_model": Recipe(_SAM2_VISION, _picture(), 16),
    "seggpt": Recipe(
        {
            "image_size": [32, 32],
            "hidden_size": 32,
            "num_attention_heads": 4,
            "patch_size": 16,
            "pretrain_image_size": 32,
            "merge_index": 0,
            "intermediate_hidden_state_indices": [1],
            "decoder_hidden_size": 8,
        },
        lambda c: {k: floats(2, 3, 16, 32) for k in ("pixel_values", "prompt_pixel_values", "prompt_masks")},
        16,
    ),
    "siglip2": Recipe(
        {},
        lambda c: {
            "input_ids": ids(),
            "pixel_values": floats(2, 16, 3 * c.vision_config.patch_size**2),
            "pixel_attention_mask": ones(2, 16),
            "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
        },
    ),
    "siglip2_vision_model": Recipe(
        {},
        lambda c: {
            "pixel_values": floats(2, 16, 3 * c.patch_size**2),
            "pixel_attention_mask": ones(2, 16),
            "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
        },
    ),
    "speecht5": Recipe(
        {}, lambda c: {"input_values": floats(2, 8, c.hidden_size), "decoder_input_values": floats(2, 8, c.hidden_size)}
    ),
    "timesfm": Recipe(
        {}, lambda c: {"past_values": floats(2, 128), "past_values_padding": ones(2, 128) * 0, "freq": ones(2, 1)}
    ),
    "timesfm2_5": Recipe({}, lambda c: {"past_values": floats(2, 128), "past_values_padding": ones(2, 128) * 0}),
    "uvdoc": Recipe({"backbone_config": {"out_features": [f"stage{i}" for i in range(1, 7)]}}, _picture(), 1),
    "videoprism": Recipe(
        {},
        lambda c: {"pixel_values_videos": floats(2, 4, 3, 36, 36), "input_ids": ids()},
        16,
        {"vision_config": {"image_size": 36, "num_frames": 4}},
    ),
    "vjepa2": Recipe(
        {"crop_size": 32, "frames_per_clip": 4}, lambda c: {"pixel_values_videos": floats(2, 4, 3, 32, 32)}, 16
    ),
    "wav2vec2-bert": Recipe({}, _speech(160, 50)),
    "wavtokenizer_encoder": Recipe(
        {"decoder_attention_num_groups": 4}, lambda c: {"input_values": floats(2, 1, 6000)}, drawn=True
    ),
    "xcodec2": Recipe(
        {"semantic_model_config": {"feature_projection_input_dim": 160}},
        lambda c: {"input_values": floats(1, 1, 3200), "input_features": floats(1, 10, 160)},
        16,
        drawn=True,
    ),
    "xmod": Recipe({"default_language": "en_XX"}),
    "qwen4_exp": _QWEN4,
    "qwen4_exp_text": _QWEN4,
    "dots3_note": _DOTS3,
    "dots3_note_text": _DOTS3,
    "deepseek_ocr2": Recipe({"text_config": {"mlp_layer_types": ["dense", "sparse"], "moe_intermediate_size": 32}}),
    "diffusion_gemma": Recipe(
        {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}},
        lambda c: {"input_ids": ids(), "decoder_input_ids": ids()},
    ),
    "ernie4_5_vl_moe": Recipe(
        {"text_config": {"rope_parameters": _PLAIN_ROPE | {"mrope_section": [1, 1, 2]}}}, None, 16
    ),
    "gemma4_assistant": Recipe(
        {
            "text_config": {
                "num_kv_shared_layers": 2,
                "num_hidden_layers": 2,
                "per_layer_config": {},
                "layer_types": ["sliding_attention", "full_attention"],
            }
        },
        _assistant,
        16,
        made={
            "text_config": {
                "hidden_size_per_layer_input": 0,
                "vocab_size_per_layer_input": 0,
                "num_kv_shared_layers": 30,
            }
        },
    ),
    "gemma4_unified_assistant": Recipe(
        {
            "text_config": {
                "num_kv_shared_layers": 2,
                "num_hidden_layers": 2,
                "per_layer_config": {},
                "layer_types": ["sliding_attention", "full_attention"],
            }
        },
        _assistant,
        16,
    ),
    "granite4_vision": Recipe(
        {
            "deepstack_layer_map": [[-1, 0]],
            "spatial_target_layers": [1],
            "downsample_rate": "1/2",
            "vision_config": {"hidden_size": 128, "num_attention_heads": 4},
        },
        None,
        16,
    ),
    "lw_detr": Recipe(
        {
            "projector_scale_factors": [1.0],
            "num_queries": 5,
            "decoder_layers": 2,
            "num_feature_levels": 1,
            "backbone_config": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 64,
                "pretrain_image_size": 64,
                "window_block_indices": [0],
                "out_features": ["stage1", "stage2"],
            },
        },
        _picture(),
        1,
        made={"projector_scale_factors": [1.0]},
    ),
    "minicpm_ocr_vision": Recipe(
        {"insert_layer_id": 0},
        lambda c: {"pixel_values": floats(1, 3, 16, 256), "target_sizes": torch.tensor([[4, 4]])},
    ),
    "minicpmv4_7_vision": Recipe(
        {"insert_layer_id": 0},
        lambda c: {"pixel_values": floats(1, 3, 16, 256), "target_sizes": torch.tensor([[4, 4]])},
    ),
    "molmo2": Recipe({"adapter_config": {"vision_feature_layer": [1, 0]}}),
    "moonshine_streaming": Recipe(
        {"num_key_value_heads": 8},
        lambda c: {"input_values": floats(2, 4000), "decoder_input_ids": ids()},
        2,
    ),
    "muse_glimmer_assistant": Recipe(
        {"target_layer_ids": [0, 1]},
        lambda c: {
            "noise_embeds": floats(2, c.block_size, c.hidden_size),
            "context_hidden_states": floats(2, 8, 2 * c.hidden_size),
        },
    ),
    "muse_spark_audio": Recipe({}, lambda c: {"input_values": floats(2, 1920 * 2)}, 4),
    "nemotron": Recipe({"num_key_value_heads": 48}),
    "nemotron3_5_transcribe_audio": Recipe({}, _speech(frames=96, mask="input_features_mask")),
    "nemotron3_5_transcribe_word_timestamp": Recipe({}, lambda c: {"inputs_embeds": floats(2, 8, c.hidden_size)}),
    "omniasr_audio": Recipe({}, lambda c: {"input_values": floats(2, 1, 4000)}),
    "omniasr_ctc": Recipe({}, lambda c: {"input_values": floats(2, 1, 4000)}),
    "pe_audio": Recipe({}, lambda c: {"input_values": floats(2, 1, 3840 * 4), "input_ids": ids()}),
    "pi0": Recipe({}, _robot, 16),
    "pp_ocrv6_medium_det": Recipe(
        {
            "backbone_config": LCNET,
            "scale_factor_list": [1, 2, 4, 8],
            "intraclass_block_config": {
                "reduce_channel": [1, 1, 0],
                "return_channel": [1, 1, 0],
                **{f"vertical_long_to_small_conv_{n}ratio": [[k, 1], 1, [k // 2, 0]] for n, k in _RATIOS},
                **{f"horizontal_small_to_long_conv_{n}ratio": [[1, k], 1, [0, k // 2]] for n, k in _RATIOS},
                **{f"symmetric_conv_long_{n}ratio": [[k, k], 1, [k // 2, k // 2]] for n, k in _RATIOS},
            },
        },
        _picture(),
        1,
    ),
    "pp_ocrv6_small_det": Recipe({"backbone_config": LCNET, "layer_list_out_channels": [8, 16, 16, 16]}, _picture(), 1),
    "pvt": Recipe({"num_encoder_blocks": 4, "image_size": 64}, _picture(), 1),
    "rf_detr": Recipe(
        {
            "num_queries": 5,
            "group_detr": 2,
            "decoder_layers": 2,
            "backbone_config": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 112,
                "window_block_indexes": [0],
                "out_features": ["stage1", "stage2"],
            },
        },
        _picture(112),
        1,
    ),
    "sam3_tracker": Recipe(
        {
            "vision_config": {
                "backbone_config": {
                    "hidden_size": 32,
                    "num_attention_heads": 4,
                    "image_size": 56,
                    "pretrain_image_size": 56,
                    "window_size": 2,
                    "global_attn_indexes": [1],
                    "intermediate_size": 64,
                },
                "fpn_hidden_size": 32,
                "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
            },
            "prompt_encoder_config": {"hidden_size": 32, "image_size": 56, "patch_size": 14},
            "mask_decoder_config": _SAM_PARTS["mask_decoder_config"],
        },
        _picture(56, **_POINTS),
        16,
    ),
    "step3p7": Recipe(
        {"text_config": {"sliding_window": 4}, "vision_config": {"hidden_size": 64, "num_attention_heads": 4}},
        lambda c: {"input_ids": ids()},
        16,
    ),
    "t5gemma2_encoder": Recipe({"text_config": {"dropout_rate": 0.0}}),
    "tvp": Recipe(
        {
            "max_img_size": 128,
            "visual_prompt_size": 8,
            "num_frames": 2,
            "backbone_config": RESNET | {"out_features": ["stage4"]},
        },
        lambda c: {"input_ids": ids(1), "pixel_values": floats(1, 2, 3, 128, 128), "attention_mask": ones(1, 8)},
        16,
    ),
    "vibevoice_acoustic_tokenizer": Recipe({"num_filters": 4}, lambda c: {"input_values": floats(2, 1, 6400)}),
    "vibevoice": Recipe({"audio_config": {"num_filters": 4}, "semantic_model_config": {"num_filters": 4}}),
    "vibevoice_asr": Recipe(
        {f"{kind}_tokenizer_encoder_config": {"num_filters": 4} for kind in ("semantic", "acoustic")}
    ),
    "vibevoice_acoustic_tokenizer_encoder": Recipe({}, lambda c: {"hidden_states": floats(2, 1, 6400)}),
    "vibevoice_acoustic_tokenizer_decoder": Recipe({}, lambda c: {"hidden_states": floats(2, 4, c.hidden_size)}),
    "video_llama_3_vision": Recipe(
        {}, lambda c: {"pixel_values": patches(c), "grid_thw": grid(), "merge_sizes": torch.tensor([2])}
    ),
    "vision-text-dual-encoder": Recipe(
        {
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 32,
                "patch_size": 16,
            },
            "text_config": {
                "model_type": "bert",
                "vocab_size": 96,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
            },
        },
        _picture(32, input_ids=ids()),
        16,
    ),
    "voxtral_realtime": Recipe({}, _speech(frames=64, swapped=True, input_ids=ids())),
    "voxtral_realtime_encoder": Recipe({}, _speech(swapped=True)),
    "xlnet": Recipe({"d_head": 4}, None, 16),
    "zamba": Recipe(
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["linear_attention", "hybrid"] * 2,
            "layer_types": ["linear_attention", "hybrid"] * 2,
        },
        None,
        16,
    ),
    "zamba2": Recipe(
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["linear_attention", "hybrid"] * 2,
            "mamba_headdim": 40,
            "hybrid_layer_ids": [1, 3],
        },
        None,
        16,
    ),
}
