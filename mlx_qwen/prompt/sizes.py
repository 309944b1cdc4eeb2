"""Which of Qwen's two sets of recommendations a model falls under."""

from mlx_qwen.config import TextConfig


def is_small(text: TextConfig) -> bool:
    """Whether the model has the shape of Qwen3.5-0.8B or -2B, which answer without thinking unless asked to."""
    return text.moe is None and text.hidden_size <= 2048 and text.num_hidden_layers == 24
