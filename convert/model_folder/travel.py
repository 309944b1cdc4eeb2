"""What travels with the weights: tokenizer, chat template, processor configs, licence and model card."""

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_qwen.checkpoint.shards import COMPANION_PATTERN
from mlx_qwen.errors import CheckpointError
from mlx_qwen.version import __version__

from ..description import Description

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

_BODY = """# {name} for MLX

Converted from {origin} with mlx-qwen {version}.

{weights}

`{companion}` holds what only mlx-qwen reads: the norms in float32 and the layer for multi-token prediction, where the
source had one. Other MLX runtimes ignore it.

```
mlx-qwen generate --model <this folder> --prompt "Hello"
```
"""


def copy_files(files: Iterable[Path], folder: Path) -> None:
    """Copy them, on the disk when this returns; raises CheckpointError for those that can no longer be read."""
    try:
        contents = {path.name: path.read_bytes() for path in files}
    except OSError as error:
        raise CheckpointError(
            f"{error.filename} can no longer be read ({error.strerror}). Put it back, or give yourself the "
            "right to read it; the same command then goes on."
        ) from error
    for name, content in contents.items():
        with (folder / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def model_card(
    source: Path,
    *,
    repository: str | None,
    description: Description,
    has_vision: bool,
    adapter: Path | None = None,
) -> str:
    """README.md: the front matter of the source's card with what changed, and a body saying what was done.

    `repository` is the Hub id that `source` was downloaded from, None for a folder of the user's own; `adapter` the
    folder of what was merged.
    """
    data = _front_matter(source / "README.md")
    data.library_name = "mlx"
    data.pipeline_tag = data.pipeline_tag or ("image-text-to-text" if has_vision else "text-generation")
    data.tags = list(dict.fromkeys([*(data.tags or []), "mlx"]))
    if repository is not None:
        data.base_model = repository
        if description.recipe is not None and adapter is None:
            data["base_model_relation"] = "quantized"
    name = source.resolve().name if repository is None else repository.split("/")[-1]
    origin = name if repository is None else f"[{repository}](https://huggingface.co/{repository})"
    if adapter is not None:
        origin += f" and the adapter {adapter.resolve().name}, merged,"
    body = _BODY.format(
        name=name,
        origin=origin,
        version=__version__,
        weights=description.markdown(),
        companion=COMPANION_PATTERN,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def _front_matter(card: Path) -> "ModelCardData":
    from huggingface_hub.repocard_data import ModelCardData

    if not card.is_file():
        return ModelCardData()
    from huggingface_hub import ModelCard

    try:
        data = ModelCard(card.read_text(encoding="utf-8")).data
        if not isinstance(data, ModelCardData):
            raise TypeError("it is no mapping")
        tags = data.tags
        data.tags = [tags] if isinstance(tags, str) else [str(tag) for tag in tags or ()]
        data.to_yaml()
    except Exception as error:  # whatever YAML, and what is built of it, makes of a stranger's text
        warnings.warn(f"The front matter of {card} is not kept, as it cannot be read: {error}", stacklevel=5)
        return ModelCardData()
    return data
