"""The demo's architecture: every part of Qwen3.5-MoE, each at the smallest size that still learns its task."""

from transformers import Qwen3_5MoeConfig

VOCAB_SIZE = 640
HIDDEN_SIZE = 128
ROPE = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.25,
    "mrope_section": [4, 2, 2],
    "mrope_interleaved": True,
}
TEXT: dict[str, object] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "num_hidden_layers": 8,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "max_position_embeddings": 4096,
    "mtp_num_hidden_layers": 1,
    "rope_parameters": ROPE,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
}
VISION: dict[str, object] = {
    "depth": 3,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_heads": 4,
    "num_position_embeddings": 36,
    "out_hidden_size": HIDDEN_SIZE,
    "initializer_range": 0.05,
}


def demo_config(image_token: int, video_token: int, vision_start: int, vision_end: int, eos: int) -> Qwen3_5MoeConfig:
    """Transformers' configuration of the demo; the arguments are ids of its tokenizer's special tokens."""
    return Qwen3_5MoeConfig(
        text_config=TEXT | {"eos_token_id": eos},
        vision_config=VISION,
        image_token_id=image_token,
        video_token_id=video_token,
        vision_start_token_id=vision_start,
        vision_end_token_id=vision_end,
        tie_word_embeddings=True,
    )
