"""Bytes of a model's weights, as the converter would write them."""

from dataclasses import dataclass

from mlx_qwen.checkpoint import parameter_count
from mlx_qwen.config import TextConfig
from mlx_qwen.convert.outputs import plan_outputs
from mlx_qwen.convert.settings import check_settings
from mlx_qwen.convert.weights import source_bytes
from mlx_qwen.planning.errors import PlanningError
from mlx_qwen.planning.source import Described
from mlx_qwen.tensors import MTP_PREFIX, Role, TensorSpec

PRECISIONS = (16, 8, 6, 5, 4, 3, 2)
UNPACKED = 16


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of the tensors of a converted checkpoint, by part.

    Attributes:
        bits: of most matrices; 16 packs none and leaves them in the source's dtype.
        text: the language model, with the companion's exact norms.
        mtp: the layer for multi-token prediction.
        vision: the vision tower.
        source: the tensors before conversion, None where only a quantized model's configuration is known.
        per_token: what decoding a token has to read of them: everything but the embedding's other rows, the experts
            that are not chosen, MTP and vision.
        active: how many weights those are.
    """

    bits: int
    text: int
    mtp: int
    vision: int
    source: int | None
    per_token: int
    active: int

    @property
    def total(self) -> int:
        """Bytes of all parts: the tensors on the disk."""
        return self.text + self.mtp + self.vision


def weights_of(model: Described, bits: int) -> Weights:
    """What the converter would write of `model` with its own recipe; raises PlanningError for other bits than its."""
    if bits not in PRECISIONS:
        raise PlanningError(f"bits is {bits}, expected one of {', '.join(map(str, sorted(PRECISIONS)))}.")
    packed = bits != UNPACKED
    settings = check_settings(
        bits=bits if packed else None, group_size=None, mode="affine", dtype=None, quantize=packed, dequantize=False
    )
    outputs = plan_outputs(model.tensors, settings)
    text = model.config.text
    parts = {"text": 0, "mtp": 0, "vision": 0}
    for output in outputs.all:
        parts[_part(output.target.spec)] += output.nbytes
    read = [output for output in outputs.main if _part(output.target.spec) == "text"]
    return Weights(
        bits=bits,
        **parts,
        source=source_bytes(model.tensors) if model.is_published else None,
        per_token=sum(_read(output.nbytes, output.target.spec, text) for output in read),
        active=sum(_read(parameter_count([output.target.spec]), output.target.spec, text) for output in read),
    )


def _part(spec: TensorSpec) -> str:
    if spec.role is Role.VISION:
        return "vision"
    return "mtp" if spec.name.startswith(MTP_PREFIX) else "text"


def _read(amount: int, spec: TensorSpec, text: TextConfig) -> int:
    """The share of `amount` of this tensor that one token needs."""
    if spec.role is Role.EXPERT and text.moe is not None:
        return amount * text.moe.num_experts_per_tok // text.moe.num_experts
    if spec.role is Role.EMBEDDING and not text.tie_word_embeddings:
        return amount // text.vocab_size
    return amount
