"""`python -m mlx_qwen` is the `mlx-qwen` command."""

from mlx_qwen.cli import main

if __name__ == "__main__":
    main(prog_name="mlx-qwen")
