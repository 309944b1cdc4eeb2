"""What enters the matrices of a decoder layer, shown to an observer while the layer runs."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from metal_kernels.moe_dispatch import combine, route, sort_by_expert, swiglu
from metal_kernels.moe_dispatch.reference import gathered_matmul
from mlx_qwen.model.decoder import DecoderLayer
from mlx_qwen.model.mlp import SparseMoE

_MIXER_INPUTS = ("in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
_ROUTED_BY = ("gate", "shared_expert_gate", "shared_expert.gate_proj", "shared_expert.up_proj")


@dataclass(frozen=True, slots=True)
class LinearInput:
    """The rows `x` [n, K] that the tensors `names` are multiplied by, all of which have K columns.

    Names are those of `checkpoint.names`. For the experts' tensors [E, N, K], `experts` is uint32 [n] in ascending
    order: row i meets the matrix of expert `experts[i]` alone. For others it is None, and every row meets every tensor.
    """

    names: tuple[str, ...]
    x: mx.array
    experts: mx.array | None = None

    def of_expert(self, expert: int) -> mx.array:
        """The rows [m, K] that go through one expert; none where the router sent it none."""
        assert self.experts is not None, "only the experts' tensors have rows by expert"
        first, last = np.searchsorted(np.array(self.experts), [expert, expert + 1])
        return self.x[int(first) : int(last)]


Observer = Callable[[LinearInput], None]


@contextmanager
def observed(layer: DecoderLayer, prefix: str, tensors: Collection[str], observer: Observer) -> Iterator[None]:
    """Within, every call of `layer` shows the inputs of its matrices.

    `tensors` are the names of all its tensors, which begin with `prefix`.
    """
    show = _Display(prefix, tensors, observer)
    with ExitStack() as stack:

        def tap(owner: nn.Module, attribute: str, *modules: str) -> None:
            stack.enter_context(_replaced(owner, attribute, _Tap(owner[attribute], modules, show)))

        if layer.is_linear:
            tap(layer.linear_attn, "in_proj_qkvz", *(f"linear_attn.{name}" for name in _MIXER_INPUTS))
            tap(layer.linear_attn, "out_proj", "linear_attn.out_proj")
        else:
            tap(layer.self_attn, "qkv_proj", *(f"self_attn.{name}_proj" for name in "qkv"))
            tap(layer.self_attn, "o_proj", "self_attn.o_proj")
        if isinstance(layer.mlp, SparseMoE):
            tap(layer.mlp.shared_expert, "down_proj", "mlp.shared_expert.down_proj")
            stack.enter_context(_replaced(layer, "mlp", _ObservedMoE(layer.mlp, show)))
        else:
            tap(layer.mlp, "down_proj", "mlp.down_proj")
            tap(layer, "mlp", "mlp.gate_proj", "mlp.up_proj")
        yield


@dataclass(frozen=True, slots=True)
class _Display:
    """Passes inputs on under the names of those tensors that the layer has."""

    prefix: str
    tensors: Collection[str]
    observer: Observer

    def __call__(self, modules: tuple[str, ...], x: mx.array, experts: mx.array | None = None) -> None:
        names = tuple(f"{self.prefix}{module}.weight" for module in modules)
        self.observer(LinearInput(tuple(name for name in names if name in self.tensors), x, experts))


class _Tap(nn.Module):
    """Shows what goes into `inner`."""

    def __init__(self, inner: nn.Module, modules: tuple[str, ...], show: _Display) -> None:
        super().__init__()
        self.inner = inner
        self._modules, self._show = modules, show

    def __call__(self, x: mx.array) -> mx.array:
        self._show(self._modules, x.reshape(-1, x.shape[-1]))
        output: mx.array = self.inner(x)
        return output


class _ObservedMoE(nn.Module):
    """A SparseMoE in steps, with each token's copies sorted by expert."""

    def __init__(self, inner: SparseMoE, show: _Display) -> None:
        super().__init__()
        self.inner = inner
        self._show = show

    def __call__(self, x: mx.array) -> mx.array:
        moe, rows = self.inner, x.reshape(-1, x.shape[-1])
        self._show(tuple(f"mlp.{name}" for name in _ROUTED_BY), rows)
        routing = route(moe.router(rows), moe.num_experts_per_tok, normalize=moe.normalize)
        gate_up, down = moe.switch_mlp.gate_up_proj.weights, moe.switch_mlp.down_proj.weights
        tokens, experts, places = sort_by_expert(routing.indices, gate_up.weight.shape[0])
        copies = rows[tokens]
        self._show(("mlp.switch_mlp.gate_proj", "mlp.switch_mlp.up_proj"), copies, experts)
        hidden = swiglu(gathered_matmul(copies[:, None], gate_up, experts, sorted_indices=True))
        self._show(("mlp.switch_mlp.down_proj",), hidden[:, 0], experts)
        outputs = gathered_matmul(hidden, down, experts, sorted_indices=True)[:, 0]
        return combine(outputs, places, routing, moe.shared_expert(rows)).reshape(x.shape)


@contextmanager
def _replaced(owner: nn.Module, attribute: str, module: nn.Module) -> Iterator[None]:
    original = owner[attribute]
    owner[attribute] = module
    try:
        yield
    finally:
        owner[attribute] = original
