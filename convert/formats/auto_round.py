"""AutoRound (`quant_method` auto-round): its codes are packed as GPTQ's or AWQ's are, as `packing_format` names.

As GPTQ's, modules may come without `g_idx`. "auto_round:auto_gptq" stores zeros less one, "auto_round" and
"auto_round:gptqmodel" store them as they are. "mlx" is MLX's own packing, under Hugging Face's names.

Source: Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent", arXiv 2309.05516, and the packing of
https://github.com/intel/auto-round.
"""

from mlx_qwen.config import Json
from mlx_qwen.errors import CheckpointError

from . import awq, gptq
from .encoded import Matrix, Tensors

_ZERO_OFFSETS = {"auto_round": 0, "auto_round:gptqmodel": 0, "auto_round:gptq": 1, "auto_round:auto_gptq": 1}
_FOR_MLX = ("mlx", "auto_round:mlx")
_AS_AWQ = ("auto_round:awq", "auto_round:auto_awq")


def is_for_mlx(settings: Json) -> bool:
    """Whether the weights are packed as MLX packs them."""
    return settings.get("quant_method") == "auto-round" and settings.get("packing_format") in _FOR_MLX


def matrices(settings: Json, tensors: Tensors) -> dict[str, Matrix]:
    """Every module with a `qweight`; raises CheckpointError for other packings and misshapen tensors."""
    packing = settings.get("packing_format") or "auto_round:auto_gptq"
    if packing in _AS_AWQ:
        return awq.matrices({name: settings[name] for name in ("bits", "group_size") if name in settings}, tensors)
    if packing not in _ZERO_OFFSETS:
        raise CheckpointError(
            f"quantization_config.packing_format is {packing!r}, expected one of "
            f"{', '.join((*_ZERO_OFFSETS, *_AS_AWQ, *_FOR_MLX))}. Use another checkpoint of the same model."
        )
    return gptq.packed_matrices(tensors, settings, _ZERO_OFFSETS[packing], in_order=True, apart="extra_config")
