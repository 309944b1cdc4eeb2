"""The kernels as differentiable functions; rows are float32 or bfloat16, parameters always float32."""

from typing import Any

import torch
from torch.autograd import Function

from tools.demo_training.fast.library import call

Tensor = torch.Tensor


def add_norm(
    residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """residual + delta, float32 [..., width], and its zero-centred RMSNorm in `dtype`.

    Args:
        residual: float32 [..., width].
        delta: [..., width] in `dtype`, or None for nothing to add.
        weight: float32 [width], the norm's factor less one.
    """
    h, normed = _AddNorm.apply(residual, delta, weight, eps, dtype)
    return h, normed


def gated_delta(rows: Tensor, Hk: int, Hv: int, weights: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """A Gated DeltaNet layer between its projections: convolution, recurrence and gated norm, [B, T, Hv * D].

    Args:
        rows: [B, T, (2 Hk + Hv) D + Hv D + 2 Hv]: queries, keys, values, then z, b and a.
        weights: float32 convolution [taps, (2 Hk + Hv) D], A_log [Hv], dt_bias [Hv] and norm [D], where D is 32.
    """
    out: Tensor = _GatedDelta.apply(rows, Hk, Hv, *weights)
    return out


def activate(gate_up: Tensor, logits: Tensor, top_k: int) -> Tensor:
    """SwiGLU of every expert times its router weight, [rows, (experts + 1) * inter]; zero where it was not chosen.

    Args:
        gate_up: [rows, (experts + 1) * 2 inter], for each expert and then the shared one its gate and its up rows.
        logits: [rows, experts + 1], the router's and then the shared expert's gate.
    """
    active: Tensor = _Activate.apply(gate_up, logits, top_k)
    return active


def turn(x: Tensor, weight: Tensor, cosine: Tensor, sine: Tensor, eps: float) -> Tensor:
    """Normalised and rotated heads, [B, H, T, D].

    Args:
        x: [B, T, H, stride], of which the first D numbers of each head are read.
        weight: float32 [D], the norm's factor less one.
        cosine, sine: float32 [B, T, rotary], for the first `rotary` of the D numbers.
    """
    out: Tensor = _Turn.apply(x, weight, cosine, sine, eps)
    return out


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Softmax attention to the tokens before and the own one, [B, H, T, D]; key and value are [B, H / group, T, D]."""
    out: Tensor = _CausalAttention.apply(query, key, value, scale)
    return out


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted sum of the rows' losses, float32 [], and bool [rows]: was the label the likeliest token.

    Args:
        logits: [rows, vocabulary].
        labels: int64 [rows], negative where there is none.
        weights: float32 [rows].
    """
    loss, right = _CrossEntropy.apply(logits, labels, weights)
    return loss, right


class _AddNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        h, normed = torch.empty_like(residual), torch.empty_like(residual, dtype=dtype)
        rows, width = residual.shape[:-1].numel(), residual.shape[-1]
        call("add_norm", dtype, residual, delta, weight, rows, width, eps, h, normed)
        ctx.save_for_backward(h, weight)
        ctx.eps, ctx.dtype, ctx.has_delta = eps, dtype, delta is not None
        ctx.set_materialize_grads(False)
        return h, normed

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None, dnormed: Tensor) -> tuple[Tensor | None, ...]:
        h, weight = ctx.saved_tensors
        rows, width = h.shape[:-1].numel(), h.shape[-1]
        dresidual, dweight = torch.empty_like(h), torch.zeros_like(weight)
        ddelta = torch.empty_like(h, dtype=ctx.dtype) if ctx.has_delta else None
        given = (None if dh is None else dh.contiguous(), dnormed.contiguous(), h, weight)
        call("add_norm_backward", ctx.dtype, *given, rows, width, ctx.eps, dresidual, ddelta, dweight)
        return dresidual, ddelta, dweight, None, None


class _GatedDelta(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, Hk: int, Hv: int, *weights: Tensor) -> Tensor:
        B, T, _ = rows.shape
        out = torch.empty(B, T, Hv * weights[-1].shape[0], dtype=rows.dtype)
        call("gated_delta", rows.dtype, rows, B, T, Hk, Hv, *weights, out)
        ctx.save_for_backward(rows, *weights)
        ctx.heads = Hk, Hv
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        rows, *weights = ctx.saved_tensors
        B, T, _ = rows.shape
        drows, gradients = torch.empty_like(rows), [torch.zeros_like(weight) for weight in weights]
        call("gated_delta_backward", rows.dtype, dout.contiguous(), rows, B, T, *ctx.heads, *weights, drows, *gradients)
        return drows, None, None, *gradients


class _Activate(Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, logits: Tensor, top_k: int) -> Tensor:
        rows, experts = logits.shape[0], logits.shape[1] - 1
        inter = gate_up.shape[1] // (2 * (experts + 1))
        weights = torch.empty(logits.shape, dtype=torch.float32)
        active = torch.empty(rows, (experts + 1) * inter, dtype=gate_up.dtype)
        call("activate", gate_up.dtype, gate_up, logits, rows, experts, inter, top_k, weights, active)
        ctx.save_for_backward(gate_up, weights)
        return active

    @staticmethod
    def backward(ctx: Any, dactive: Tensor) -> tuple[Tensor | None, ...]:
        gate_up, weights = ctx.saved_tensors
        rows, experts = weights.shape[0], weights.shape[1] - 1
        sizes = (rows, experts, gate_up.shape[1] // (2 * (experts + 1)))
        dgate_up, dlogits = torch.empty_like(gate_up), torch.empty_like(weights, dtype=gate_up.dtype)
        call("activate_backward", gate_up.dtype, dactive.contiguous(), gate_up, weights, *sizes, dgate_up, dlogits)
        return dgate_up, dlogits, None


class _Turn(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, cosine: Tensor, sine: Tensor, eps: float) -> Tensor:
        B, T, H, stride = x.shape
        width, rotary = weight.shape[0], cosine.shape[-1]
        out = torch.empty(B, H, T, width, dtype=x.dtype)
        call("turn", x.dtype, x, weight, cosine, sine, B, T, H, width, stride, rotary, eps, out)
        ctx.save_for_backward(x, weight, cosine, sine)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, cosine, sine = ctx.saved_tensors
        sizes = (*x.shape[:3], weight.shape[0], x.shape[3], cosine.shape[-1])
        dx, dweight = torch.zeros_like(x), torch.zeros_like(weight)
        given = (dout.contiguous(), x, weight, cosine, sine)
        call("turn_backward", x.dtype, *given, *sizes, ctx.eps, dx, dweight)
        return dx, dweight, None, None, None


class _CausalAttention(Function):
    """Query heads that share a key head are rows of one product with it."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        B, H, T, D = query.shape
        grouped = query.view(B * key.shape[1], -1, D)
        probabilities = grouped @ key.view(-1, T, D).mT
        call("causal_softmax", query.dtype, probabilities, B * H, T, scale)
        ctx.save_for_backward(query, key, value, probabilities)
        ctx.scale = scale
        return (probabilities @ value.view(-1, T, D)).view(query.shape)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, probabilities = ctx.saved_tensors
        B, H, T, D = query.shape
        grouped, dgrouped = query.view(B * key.shape[1], -1, D), dout.contiguous().view(B * key.shape[1], -1, D)
        dvalue = probabilities.mT @ dgrouped
        dscores = dgrouped @ value.view(-1, T, D).mT
        call("causal_softmax_backward", query.dtype, probabilities, dscores, B * H, T, ctx.scale)
        dquery, dkey = dscores @ key.view(-1, T, D), dscores.mT @ grouped
        return dquery.view(query.shape), dkey.view(key.shape), dvalue.view(value.shape), None


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        rows, vocabulary = logits.shape
        dlogits, right = torch.empty_like(logits), torch.empty(rows, dtype=torch.bool)
        loss = call("cross_entropy", logits.dtype, logits, labels, weights, rows, vocabulary, dlogits, right)
        ctx.save_for_backward(dlogits)
        ctx.mark_non_differentiable(right)
        return torch.tensor(loss), right

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (dlogits,) = ctx.saved_tensors
        return dlogits * dloss.to(dlogits.dtype), None, None
