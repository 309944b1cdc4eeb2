"""Whether what is converted can be loaded afterwards, asked before the work begins."""

from pathlib import Path

from jinja2 import TemplateSyntaxError

from mlx_qwen.config import ModelConfig
from mlx_qwen.errors import CheckpointError
from mlx_qwen.prompt import Processor
from mlx_qwen.prompt.jinja import compile_template

_TOKENIZER = "tokenizer.json"
_OTHER_FORMS = ("vocab.json", "merges.txt", "tokenizer_config.json", "tokenizer.model", "vocab.txt")


def check_loadable(source: Path, config: ModelConfig) -> tuple[str, ...]:
    """Read the files that travel along as loading will; returns a remark on weights that come without any tokenizer.

    Raises CheckpointError for a tokenizer in another form than tokenizer.json, and for one, a chat template or settings
    that cannot be read.
    """
    if not any((source / name).exists() for name in (_TOKENIZER, *_OTHER_FORMS)):
        return (f"The source has no {_TOKENIZER}: the output loads once one is put beside it.",)
    processor = Processor.from_directory(source, config)
    template = processor.chat_template
    _ = processor.image_processor, processor.video_processor  # which read their settings
    try:
        compile_template(template or "")
    except TemplateSyntaxError as error:
        raise CheckpointError(
            f"The chat template of {source} is no valid Jinja, line {error.lineno}: {error.message}. Correct it there, "
            "or download it again."
        ) from error
    return ()
