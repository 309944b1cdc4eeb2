"""Formats of other runtimes: which of them the converter reads, and what to use instead of the others."""

from mlx_qwen.config import Json, ModelConfig
from mlx_qwen.errors import ConfigError

# The `quant_method` of config.json; `mlx_qwen.convert.formats` decodes each of them.
CONVERTED = (
    "fp8",
    "gptq",
    "awq",
    "auto-round",
    "compressed-tensors",
    "modelopt",
    "modelopt_fp4",
    "quark",
)


def unreadable(method: object) -> str:
    """What to say of a `quant_method` that neither MLX nor the converter reads; follows "the weights are"."""
    return (
        f"quantized with {method!r:.100}, which is not read here. Expected one of {', '.join(CONVERTED)}, or bf16, "
        "fp16, fp32 or MLX weights: use the unquantized checkpoint of the same model, or a conversion of it for MLX."
    )


def foreign_quantization(config: ModelConfig) -> Json | None:
    """The settings of weights that are quantized for another runtime, with their `quant_method`; None for others.

    Raises ConfigError for settings that are no object, or whose method is no text.
    """
    for place in (config.raw, config.raw.get("text_config") or {}):
        for key in ("quantization_config", "compression_config"):
            settings = place.get(key) or {}
            if not isinstance(settings, dict):
                raise ConfigError(f"{key} of config.json is {settings!r:.200}, expected an object.")
            method = settings.get("quant_method")
            if method is not None and not isinstance(method, str):
                raise ConfigError(f"{key}.quant_method of config.json is {method!r:.200}, expected a text.")
            if method is not None:
                return settings
    return None
