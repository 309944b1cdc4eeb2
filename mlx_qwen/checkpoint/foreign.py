"""Formats of other runtimes: which of them the converter reads, and what to use instead of the others."""

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
