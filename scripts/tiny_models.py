"""A tiny random model of each family of causal language models that transformers has, made from its configuration class."""

from typing import Any

import torch

N_LAYERS = 4
HIDDEN, HEADS, GROUPS, HEAD, INNER, EXPERT, EXPERTS, VOCABULARY, POSITIONS, WINDOW = 32, 4, 2, 8, 48, 24, 4, 64, 64, 16

# Names of sizes in configurations
SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_dim", "emb_dim", "word_embed_proj_dim", "lru_width"), HIDDEN),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"), N_LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "swa_num_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_query_groups"), GROUPS),
    **dict.fromkeys(("head_dim", "d_head", "dim_head", "swa_head_dim", "kv_channels"), HEAD),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_inner", "dff", "dim_ff", "n_inner", "ffn_hidden_size"), INNER),
    **dict.fromkeys(("intermediate_size_mlp", "shared_intermediate_size", "dense_intermediate_size"), INNER),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), EXPERT),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), EXPERT),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "zero_expert_num"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("topk_group", "n_group", "num_expert_group", "first_k_dense_replace", "n_shared_experts", "num_dense_layers"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "model_max_length", "n_ctx", "context_length"), POSITIONS),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "laurel_rank", "adapter_rank", "hc_lowrank", "gated_norm_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_head_dim", "query_pre_attn_scalar"), HEAD),
    **dict.fromkeys(("linear_num_key_heads", "mamba_n_groups", "n_groups", "mamba_ngroups"), 2),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), HEADS),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), HEAD),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state", "time_step_rank", "mamba_dt_rank"), HEAD),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "local_attention", "attention_window_size", "window_size"), WINDOW),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "attention_chunk_size", "block_size"), WINDOW),
    **dict.fromkeys(("hidden_size_per_layer_input", "ple_embed_dim", "d_rel", "router_hidden_size", "index_topk"), HEAD),
    "qk_head_dim": 2 * HEAD,
    "rotary_dim": 4,
    "index_n_heads": 2,
}
# What else the sizes of a family depend on
ROPE = dict(rope_type="default", rope_theta=1e4)
MLA = dict(num_key_value_heads=HEADS)
EXTRA: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "bailing_hybrid", "deepseek_v3", "deepseek_v32", "dots3_note_text", "glm4_moe_lite"), MLA),
    **dict.fromkeys(("glm_moe_dsa", "kimi_linear", "minicpm3", "youtu", "longcat_flash"), MLA),
    "deepseek_v2": MLA | dict(num_experts_per_tok=2, n_group=1, topk_group=1),
    "bamba": dict(mamba_n_heads=4, mamba_d_head=16, attn_layer_indices=[1, 3]),
    "granitemoehybrid": dict(mamba_n_heads=4, mamba_d_head=16, layer_types=["mamba", "attention"] * 2),
    "mamba2": dict(head_dim=16),
    "cohere_compass_text": dict(rope_parameters=dict.fromkeys(("full_attention", "sliding_attention"), ROPE)),
    "qwen4_exp_text": dict(indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=HEAD, indexer_budget=8, indexer_compress_ratio=2),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=1e4),
        ffn_config=dict(ffn_hidden_size=INNER, moe_num_experts=EXPERTS, moe_top_k=2),
    ),
    "gemma3n_text": dict(num_kv_shared_layers=0),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2),
    "zaya": dict(num_experts_per_tok=1),
}


def families() -> dict[str, str]:
    """transformers' classes for causal language modelling, by `model_type`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def left_out(family: str) -> str:
    """Why a family is not a decoder-only language model of text; empty if it is one."""
    from transformers.models.auto import modeling_auto as auto

    if family in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "an encoder"
    if family in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES or family in auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES:
        return "the decoder of an encoder"
    return ""


def text_family(family: str) -> str:
    """The family of the text model, if that is listed as a family too."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        text = CONFIG_MAPPING[family]().get_text_config().model_type
    except Exception:  # a configuration with several texts may fail in any way
        return family
    return text if text in families() else family


def tiny_config(family: str) -> Any:
    """A configuration of the text model with all known sizes made small and blocks of each kind."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    usual = CONFIG_MAPPING[family]().get_text_config()
    values = {name: value for name, value in vars(usual).items() if not name.startswith("_")}
    settings: dict[str, Any] = {name: SIZES[name] for name, value in values.items() if name in SIZES and not isinstance(value, list)}
    lists = {
        name: value for name, value in values.items() if isinstance(value, list) and len(value) == getattr(usual, "num_hidden_layers", 0)
    }
    for step, (name, value) in enumerate(sorted(lists.items())):
        kinds = list(dict.fromkeys(value))
        settings[name] = [kinds[(layer >> step) % len(kinds)] for layer in range(N_LAYERS)]
    return type(usual)(**(settings | dict(bos_token_id=0, eos_token_id=1, pad_token_id=2) | EXTRA.get(family, {})))


def tiny_model(family: str) -> Any:
    """A model with random weights, also for those that normally start at 0 or 1, which would hide mistakes."""
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, families()[family])._from_config(tiny_config(family), attn_implementation="eager").float()
    for name, weight in model.named_parameters():
        gain = weight.ndim < 2 and "norm" in name and "bias" not in name
        torch.nn.init.normal_(weight, mean=float(gain), std=0.3 if weight.ndim < 2 else 0.15)
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):  # Gemma 4's
            torch.nn.init.uniform_(buffer, 0.5, 1.5)
    return model
