"""What is told of a device that fails, such as a GPU that runs out of memory: one line, like any other error."""


def is_device_failure(error: Exception) -> bool:
    """Whether MLX raised it: of RuntimeError itself, or MemoryError. Python's own kinds of RuntimeError are faults."""
    return type(error) is RuntimeError or isinstance(error, MemoryError)


def told(error: Exception) -> str:
    """One line: what MLX says, and what to do next."""
    said = " ".join(str(error).split()) or type(error).__name__
    return (
        f"The device failed: {said[:300]}. If memory ran out: --kv-bits 8 or 4, a lower --prefill-step-size or "
        "--max-tokens, or a smaller model; `mlx-qwen plan` says what fits."
    )
