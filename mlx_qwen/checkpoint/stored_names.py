"""Names that trainers, wrappers and other writers give to tensors, and the MLX names that they mean."""

import re

from mlx_qwen.checkpoint.names import MTP_PREFIX, VISION_PREFIX, text_prefix
from mlx_qwen.config import ModelConfig

# Left by PEFT, data parallelism, torch.compile and a trainer that keeps decays in fp32.
_WRAPPERS = re.compile(r"^(?:base_model\.model\.|module\.|_orig_mod\.)+")
_WITHIN = re.compile(r"(?<=\.)(?:_orig_mod|_fp32_params|_fsdp_wrapped_module)\.")
_TEXT = r"(?:model\.)*(?:language_model\.)?(?:model\.)*"
_PARTS = (
    (re.compile(rf"{_TEXT}mtp\."), MTP_PREFIX),
    (re.compile(r"(?:model\.)*(?:visual|vision_tower|vision_model)\."), VISION_PREFIX),
    (re.compile(rf"{_TEXT}lm_head\."), "lm_head."),
    (re.compile(rf"{_TEXT}(?=(?:embed_tokens|layers|norm)\.)"), "model."),
)


def mlx_name(name: str, config: ModelConfig) -> str:
    """The MLX name of a tensor or module, given any name that it goes by; other names as they are."""
    name = _WITHIN.sub("", _WRAPPERS.sub("", name))
    for pattern, part in _PARTS:
        found = pattern.match(name)
        if found is not None:
            prefix = "" if part in (MTP_PREFIX, VISION_PREFIX) else text_prefix(config)
            return prefix + part + name[found.end() :]
    return name
