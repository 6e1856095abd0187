"""Tiny models of many architectures, each rate of dropout and noise at 0.1 or more."""

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# By the names that configs have for them; what a config lacks is left out.
SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "lru_width", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner"), 64),
    **dict.fromkeys(DEPTH, 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads", "num_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 256),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "num_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "linear_key_head_dim"), 8),
    **dict.fromkeys(("mamba_d_state", "state_size", "mamba_n_heads", "mamba_d_head", "chunk_size", "block_size"), 8),
    **dict.fromkeys(("rotary_dim", "mamba_dt_rank", "time_step_rank", "linear_num_value_heads"), 4),
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "mamba_n_groups", "first_k_dense_replace"), 1),
    "vocab_size": 264,
    "linear_value_head_dim": 8,
    "mamba_chunk_size": 8,
    "sliding_window": 6,  # shorter than the rows
    "attention_window_size": 16,
    "expand": 2,
    "mamba_expand": 2,
    "use_mamba_kernels": False,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
}

LATENT = {"num_key_value_heads": 4}  # multi-head latent attention
# Family -> what its config needs besides.
DENSE = {
    "apertus": {},
    "arcee": {},
    "biogpt": {},
    "bloom": {},
    "codegen": {},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {},
    "ctrl": {},
    "doge": {},
    "ernie4_5": {},
    "exaone4": {},
    "falcon": {},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma": {},
    "gemma2": {"final_logit_softcapping": 2.0},
    "gemma3_text": {},
    "glm": {},
    "glm4": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "gpt_neox": {},
    "gptj": {},
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.3},
    "helium": {},
    "hunyuan_v1_dense": {},
    "lfm2": {},
    "llama": {},
    "mamba": {},
    "mamba2": {"num_heads": 8},
    "ministral": {},
    "minicpm3": {**LATENT, "scale_emb": 1, "dim_model_base": 32},
    "mistral": {},
    "mpt": {"attn_config": {"attn_pdrop": 1}},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "opt": {},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen3": {},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "logits_soft_cap": 2.0},
    "rwkv": {},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "xglm": {},
}
EXPERTS = {
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attn_config": {"kv_n_heads": 2, "attn_pdrop": 0.1, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "moe_jitter_eps": 0.1},
    },
    "deepseek_v3": LATENT,
    "ernie4_5_moe": {},
    "glm4_moe": {},
    "gpt_oss": {},
    "granitemoe": {},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 0},
    "jetmoe": {},
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "minimax": {},
    "mixtral": {},
    "olmoe": {},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "qwen3_next": {},
}


def make_family(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, layers: int = 2) -> nn.Module:
    """A model of few layers with random weights, large enough for sharp distributions."""
    config_class = CONFIG_MAPPING[kind]
    defaults = config_class().to_dict()
    names = defaults.keys() | getattr(config_class, "attribute_map", {}).keys()
    options = {name: value for name, value in SIZES.items() if name in names}
    options |= dict.fromkeys(options.keys() & DEPTH, layers)
    for name, value in defaults.items():
        rate = isinstance(value, int | float) and not isinstance(value, bool)
        if rate and ("drop" in name or "jitter" in name or "pdrop" in name):
            options[name] = 0.1
    if defaults.get("layer_types"):
        kinds = list(dict.fromkeys(defaults["layer_types"]))
        options["layer_types"] = (kinds * layers)[:layers]
    config = config_class(**(options | {**DENSE, **EXPERTS}.get(kind, {})))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    if kind in EXPERTS:
        model.set_experts_implementation("eager")  # the others have no float64
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim >= 2:
                weight.normal_(0, 0.2)
    return model.to(dtype)
