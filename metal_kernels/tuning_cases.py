"""Which kernels a model of given sizes runs, and the calls by which they are compared and timed."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx

from metal_kernels.calls import (
    AttentionSizes,
    Call,
    ContextCalls,
    ExpertSizes,
    SparseCalls,
    StreamCalls,
    best_tokens,
    dense_mlp,
    mixer,
    rule,
    sparse_weights,
    top_tokens,
)
from metal_kernels.gated_delta import Heads
from metal_kernels.gated_delta.head_kernels import threads as head_threads
from metal_kernels.gated_delta.rule.prefill import PrefillForm
from metal_kernels.parity import Arrays
from metal_kernels.parity_cases import SUM_TOLERANCE, TOLERANCES

# Enough experts that tokens seldom share one, and few enough to make up in a moment.
_MOST_EXPERTS = 16
_VERIFIED, _SORTED, _CONTEXT = 4, 64, 512


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What the kernels' shapes follow from; None for what a model has not.

    Attributes:
        dtype: of activations.
        hidden: width of the residual stream.
        heads: of the Gated DeltaNet layers, and `taps` of their convolutions.
        attention: heads of the full attention layers.
        experts: of the sparse layers.
        dense: intermediate size of the dense layers, and `dense_packing` bits, group size and mode of their matrices.
        vocabulary: how many tokens there are.
    """

    dtype: mx.Dtype
    hidden: int
    heads: Heads | None = None
    taps: int = 4
    attention: AttentionSizes | None = None
    experts: ExpertSizes | None = None
    dense: int | None = None
    dense_packing: tuple[int, int, str] = (0, 64, "affine")
    vocabulary: int | None = None

    @property
    def widest_key(self) -> int:
        """Width of the key heads of Gated DeltaNet layers."""
        return 0 if self.heads is None else self.heads.key_dim


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel's call: to `tolerance` of the largest value, in threadgroups of `threads` where it may choose.

    `also` is a call of the same kernel that is compared and not timed; `compared`, if given, is compared in place of
    `run`.
    """

    kernel: str
    run: Call
    tolerance: float
    threads: int = 0
    also: Call | None = None
    compared: Call | None = None

    def calls(self) -> Arrays:
        """Everything that is compared."""
        return [*(self.compared or self.run)(), *(self.also() if self.also else ())]


@dataclass(frozen=True, slots=True)
class RuleCase:
    """The gated delta rule, in the form that it is called with."""

    run: Callable[[PrefillForm], Arrays]
    tolerance: float


def cases(sizes: ModelSizes) -> list[Case]:
    """Every kernel of a decoded token, of a verified run of tokens, and around a piece of a prompt, each alone."""
    dtype, tolerance = sizes.dtype, TOLERANCES[sizes.dtype]
    stream = StreamCalls(sizes.hidden, sizes.attention, 1, dtype)
    norm_threads = min(1024, 32 * -(-sizes.hidden // 128))
    found = [
        Case("rms_norm", stream.rms_norm, tolerance, norm_threads),
        Case("add_rms_norm", stream.add_rms_norm, tolerance, norm_threads),
    ]
    if sizes.attention is not None:
        found += [
            Case("attention_prologue", stream.prologue, tolerance),
            Case("attention_epilogue", stream.epilogue, tolerance),
        ]
        one, several = (ContextCalls(sizes.attention, T, _CONTEXT, dtype) for T in (1, _VERIFIED))
        found += [
            Case("attention", one.plain, tolerance, sizes.attention.head_dim, several.plain),
            Case(
                "packed_attention",
                one.packed,
                tolerance,
                sizes.attention.head_dim,
                several.compared,
                compared=one.compared,
            ),
        ]
    if sizes.heads is not None:
        single = mixer(sizes.heads, sizes.hidden, 1, dtype, taps=sizes.taps)
        run = mixer(sizes.heads, sizes.hidden, _VERIFIED, dtype, taps=sizes.taps)
        _, groups = head_threads("", sizes.heads)
        found += [
            Case("gated_delta_mixer", single.plain, tolerance, 32 * groups, run.verified),
            Case("roll_back", run.taken_back, tolerance, 32 * groups),
        ]
    if sizes.experts is not None:
        fewer = _fewer(sizes.experts)
        weights = sparse_weights(fewer, sizes.hidden, dtype)
        few, many = (SparseCalls(fewer, sizes.hidden, n, dtype, weights) for n in (1, _SORTED))
        router = SparseCalls(sizes.experts, 64, 1, dtype, weights)
        found += [
            Case("route", router.route, TOLERANCES[mx.float32]),
            Case("routed_gate_up", few.routed, tolerance),
            Case("expert_gate_up", few.gate_up, tolerance),
            Case("expert_down_combine", few.down, tolerance),
            Case("sort_by_expert", many.sort, 0.0),
            Case("combine", many.combine, tolerance),
        ]
    if sizes.dense is not None or sizes.experts is not None:
        inner = sizes.dense or (sizes.experts.inner if sizes.experts else 0)
        activation = StreamCalls(2 * inner, None, 1, dtype)
        found.append(Case("swiglu", activation.swiglu, tolerance))
    if sizes.dense is not None:
        found.append(Case("mlp_gate_up", mlp_case(sizes)(1), tolerance))
    if sizes.vocabulary is not None:
        chosen, verified = (best_tokens(sizes.vocabulary, rows, dtype) for rows in (1, _VERIFIED))
        found.append(Case("best_tokens", chosen, SUM_TOLERANCE, also=verified))
        # What is ranked has been penalized, in fp32.
        ranked, more = (
            top_tokens(sizes.vocabulary, rows, min(rows * 20, sizes.vocabulary), mx.float32) for rows in (1, 2)
        )
        found.append(Case("top_tokens", ranked, SUM_TOLERANCE, also=more))
    return found


def context_case(sizes: ModelSizes, context: int) -> Call:
    """A token's attention to a context."""
    assert sizes.attention is not None, "asked only for models with attention layers"
    return ContextCalls(sizes.attention, 1, context, sizes.dtype).plain


def mlp_case(sizes: ModelSizes) -> Callable[[int], Call]:
    """A dense MLP up to its activation, by the number of its tokens."""
    inner = sizes.dense
    assert inner is not None, "asked only for models with dense layers"
    return lambda rows: dense_mlp(sizes.dense_packing, sizes.hidden, inner, rows, sizes.dtype)


def rule_case(sizes: ModelSizes, T: int) -> RuleCase:
    """T tokens of a prompt through the gated delta rule."""
    assert sizes.heads is not None, "asked only for models with Gated DeltaNet layers"
    return RuleCase(rule(sizes.heads, T, sizes.dtype), TOLERANCES[sizes.dtype])


def expert_case(sizes: ModelSizes) -> Callable[[int], SparseCalls]:
    """A sparse layer's calls, by the number of its tokens."""
    assert sizes.experts is not None, "asked only for models with experts"
    fewer = _fewer(sizes.experts)
    weights = sparse_weights(fewer, sizes.hidden, sizes.dtype)
    return lambda rows: SparseCalls(fewer, sizes.hidden, rows, sizes.dtype, weights)


def _fewer(sizes: ExpertSizes) -> ExpertSizes:
    return replace(sizes, experts=max(sizes.chosen, min(sizes.experts, _MOST_EXPERTS)))
