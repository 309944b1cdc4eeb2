"""The demo: a tiny trained checkpoint of the whole architecture, and the tasks that it was trained on."""

from pathlib import Path

from mlx_qwen.errors import CheckpointError

DEMO_FOLDER = Path(__file__).parent / "checkpoint"


def demo_folder() -> Path:
    """The folder of the bundled checkpoint; raises CheckpointError when it was not installed with the package."""
    if not (DEMO_FOLDER / "config.json").is_file():
        raise CheckpointError(
            f"The bundled demo checkpoint is missing from {DEMO_FOLDER}. Install mlx-qwen again, or name a model: a "
            "folder with config.json and *.safetensors, or a repository such as Qwen/Qwen3.5-0.8B."
        )
    return DEMO_FOLDER
