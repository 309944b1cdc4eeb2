"""Small modules that every block uses."""

from copy import copy
from typing import TypeVar

import mlx.core as mx
import mlx.nn as nn

from metal_kernels.moe_dispatch import ExpertWeights
from metal_kernels.norm import add_rms_norm, rms_norm

AnyLinear = nn.Linear | nn.QuantizedLinear
AnyEmbedding = nn.Embedding | nn.QuantizedEmbedding
Rows = TypeVar("Rows", bound=nn.Module)


class MicroscaledEmbedding(nn.QuantizedEmbedding):
    """An embedding packed with mxfp4, mxfp8 or nvfp4, whose values come in `dtype`: its scales have none to give."""

    def __init__(self, group_size: int, bits: int, mode: str, dtype: mx.Dtype) -> None:
        super().__init__(1, 4 * group_size, group_size=group_size, bits=bits, mode=mode)
        self._dtype = dtype

    def __call__(self, x: mx.array) -> mx.array:
        """int [...] to vectors [..., size]."""
        vectors: mx.array = super().__call__(x)
        return vectors.astype(self._dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm whose `weight` is the factor itself, kept in fp32: 1 + w loses its low bits in bf16."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = mx.ones(size)
        self.eps = eps

    def __call__(self, x: mx.array, dtype: mx.Dtype | None = None) -> mx.array:
        """The norm of x [..., size] in `dtype`, x's own by default."""
        return rms_norm(x, self.weight, self.eps, dtype)

    def of_sum(self, x: mx.array, branch: mx.array) -> tuple[mx.array, mx.array]:
        """x + branch in fp32, and its norm in branch's dtype; both [..., size]."""
        return add_rms_norm(x, branch, self.weight, self.eps)


class FusedLinear(nn.Module):
    """Projections of one input, side by side: `parts` are as few matrices as their precision allows."""

    def __init__(self, input_size: int, output_sizes: list[int], bias: bool = False) -> None:
        super().__init__()
        self.parts: list[AnyLinear] = [nn.Linear(input_size, size, bias=bias) for size in output_sizes]

    def __call__(self, x: mx.array) -> mx.array:
        outputs: list[mx.array] = [part(x) for part in self.parts]
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=-1)

    def rows(self, first: int, last: int) -> "FusedLinear":
        """The projections first to last - 1 alone, whose weights are views of this one's."""
        picked = FusedLinear(1, [])
        for part in self.parts:
            size = part.weight.shape[0]
            if first < size and last > 0:
                picked.parts.append(rows_of(part, max(first, 0), min(last, size)))
            first, last = first - size, last - size
        return picked


def rows_of(part: Rows, first: int, last: int) -> Rows:
    """A module of the same kind that holds some rows of each of its arrays, as views."""
    picked = copy(part)
    for name in ("weight", "scales", "biases", "bias"):
        if name in part:
            picked[name] = part[name][first:last]
    return picked


class ExpertLinear(nn.Module):
    """One matrix per expert, [E, N, K], dense."""

    def __init__(self, num_experts: int, input_size: int, output_size: int) -> None:
        super().__init__()
        self.weight = mx.zeros((num_experts, output_size, input_size))

    @property
    def weights(self) -> ExpertWeights:
        return ExpertWeights(self.weight)


class QuantizedExpertLinear(nn.Module):
    """One matrix per expert, packed by `mx.quantize`."""

    def __init__(self, group_size: int, bits: int, mode: str) -> None:
        super().__init__()
        self.group_size = group_size
        self.bits = bits
        self.mode = mode
        self.weight = mx.zeros(0)
        self.scales = mx.zeros(0)

    @property
    def weights(self) -> ExpertWeights:
        return ExpertWeights(self.weight, self.scales, self.get("biases"), self.group_size, self.bits, self.mode)


AnyExpertLinear = ExpertLinear | QuantizedExpertLinear
