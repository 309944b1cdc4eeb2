"""Registers of every kernel at the sizes of the parity cases: `python -m tests.metal_kernels.registers` prints them."""

import os
import re
from collections.abc import Callable, Mapping
from functools import cache
from math import prod
from typing import Any
from unittest.mock import patch

import mlx.core as mx

from metal_kernels.calls import (
    AttentionSizes,
    ContextCalls,
    ExpertSizes,
    SparseCalls,
    best_tokens,
    sparse_weights,
    top_tokens,
)
from metal_kernels.gated_delta.rule.prefill import gated_delta_prefill
from metal_kernels.parity_cases import probes
from tests.metal_emulator import EmulatedKernel, emulated
from tests.metal_emulator.registers import Registers, count, limit
from tests.metal_emulator.signature import make_signature
from tests.metal_kernels.gated_delta.mixer_calls import call, layer_inputs
from tests.metal_kernels.gated_delta.rule_oracle import random_inputs
from tests.metal_kernels.mlx_kernels import mlx_kernels
from tests.metal_kernels.specialisation import Specialisation

_MIXER = "gated_delta_mixer<bfloat16_t, {}, 128, 128, 4, 2, 16, 0, {}>"
PACKINGS = [
    *(("affine", bits, 64) for bits in (2, 3, 4, 5, 6, 8)),
    *(("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)),
]
# What each line of the table counts: patterns of one kernel's name each.
ROWS = {
    "mixer, heads of 128: 1 / 8 tokens": [_MIXER.format(T, 0) for T in (1, 8)],
    "the same with a tape: 1 / 4 / 8 tokens": [_MIXER.format(T, 1) for T in (1, 4, 8)],
    "replay, heads of 128": ["gated_delta_replay<.*, 128, 128, .*>"],
    "prefill, chunked: keys of 64 / 128": [f"gated_delta_prefill_chunked<{Dk}, .*>" for Dk in (64, 128)],
    "prefill, sequential: keys of 64 / 128": [f"gated_delta_prefill_sequential<{Dk}, .*>" for Dk in (64, 128)],
    "prefill, sequential: keys of 256 (no released model)": ["gated_delta_prefill_sequential<256, .*>"],
    **{
        f"{name}: {label}": [f"{kernel}{bits}, {group}, {int(mode != 'affine')}, .*>" for mode, bits, group in packings]
        for name, kernel in (
            ("gate and up", "expert_gate_up<bfloat16_t, "),
            ("down and combine", "expert_down_combine<bfloat16_t, 4, "),
        )
        for label, packings in (("2 / 3 / 4 / 5 / 6 / 8 bits", PACKINGS[:6]), ("mxfp4 / nvfp4 / mxfp8", PACKINGS[6:]))
    },
    "gate and up of a dense MLP, 8 bits / with routing to 8 of 256, 4 bits": [
        "mlp_gate_up<bfloat16_t, 8, .*>",
        "routed_gate_up<bfloat16_t, 256, .*>",
    ],
    "attention prologue, 32 heads": ["attention_prologue<bfloat16_t, 32, .*>"],
    "attention epilogue": ["attention_epilogue<.*>"],
    "attention, heads of 256: 8 / 32 rows": [f"decode_attention<bfloat16_t, 256, {blocks}, .*>" for blocks in (1, 4)],
    "the same, 32 rows: 4 / 8 bits": [
        f"packed_decode_attention<bfloat16_t, 256, 4, .*, {bits}, 64>" for bits in (4, 8)
    ],
    "combining runs of keys": ["combine_attention<.*>"],
    "norm / norm of a sum": ["rms_norm<.*>", "add_rms_norm<.*>"],
    "best token of 248,320: of parts / of all": ["best_of_parts<bfloat16_t, 61, .*>", "best_of_all<61>"],
    "the 20 best of 248,320: of parts / of all": ["top_of_parts<float, 61, 16, 20>", "top_of_all<61, 20>"],
    "the 64 best of 248,320: of parts / of all": ["top_of_parts<float, 61, 16, 64>", "top_of_all<61, 64>"],
    "router / sort / combine / swiglu": ["route<.*>", "sort_by_expert", "combine<.*>", "swiglu_rows<.*>"],
}


def specialisations(run: Callable[[], object]) -> dict[str, Specialisation]:
    """What `run` compiles on the Metal backend, by name, without running it: outputs are zeros."""
    found: dict[str, Specialisation] = {}

    def noted(kernel: EmulatedKernel, **given: Any) -> list[mx.array]:
        signature = make_signature(kernel.source, given["inputs"], given["output_dtypes"], tuple(given["template"]))
        made = Specialisation(kernel.source, signature, tuple(given["threadgroup"]))
        found[made.name] = made
        shapes = zip(given["output_shapes"], given["output_dtypes"], strict=True)
        return [mx.zeros(shape, dtype) for shape, dtype in shapes]

    environment = patch.dict(os.environ, MLX_QWEN_KERNELS="metal")
    with environment, emulated(), patch.object(EmulatedKernel, "__call__", noted):
        run()
    return found


def _calls() -> None:
    """The parity cases, heads of 64 and 256, and as many tokens as a verify step has."""
    for probe in probes():
        probe.run()
    for T in (1, 4, 8):
        call(**layer_inputs(T, Dk=128, Dv=128, dtype=mx.bfloat16), tape=True)
    for Dk in (64, 128, 256):
        rule = random_inputs(3, Dk=Dk, Dv=128, Hk=1, Hv=1, dtype=mx.bfloat16)
        arrays = (rule.q, rule.k, rule.v, rule.log_decay, rule.beta, rule.state)
        gated_delta_prefill(*arrays, form="sequential")
        if Dk <= 128:
            gated_delta_prefill(*arrays, form="chunked")
    ContextCalls(AttentionSizes(16, 4), 1, 100, mx.bfloat16).plain()
    best_tokens(248_320, 1, mx.bfloat16)()
    for k in (20, 64):
        top_tokens(248_320, 1, k, mx.float32)()
    for mode, bits, group in PACKINGS:
        sizes = ExpertSizes(4, 4, 128, 128, bits, group, mode)
        SparseCalls(sizes, 128, 1, mx.bfloat16, sparse_weights(sizes, 128, mx.bfloat16)).layer()
    # The most experts of a released model, 8 of 256 chosen.
    many = ExpertSizes(256, 8, 64, 64, 4)
    SparseCalls(many, 64, 1, mx.bfloat16, sparse_weights(many, 64, mx.bfloat16)).routed()


def shipped() -> dict[str, Specialisation]:
    """Every kernel once: in bf16, or as the parity cases have it where they have no bf16."""
    chosen: dict[str, Specialisation] = {}
    for name, made in specialisations(_calls).items():
        anonymous = re.sub(r"\b(bfloat16_t|float16_t|float)\b", "T", name)
        if anonymous not in chosen or "bfloat16_t" in name:
            chosen[anonymous] = made
    return {made.name: made for made in chosen.values()}


@cache
def counted(made: Specialisation) -> Registers:
    """Registers at the limit of the kernel's threadgroup."""
    return count(made.source, made.signature, made.threadgroup, limit(made.threadgroup))


def table(kernels: Mapping[str, Specialisation]) -> list[str]:
    """The lines of the table in docs/kernels.md, one for each of `ROWS`, and MLX's own kernels."""
    lines = ["| kernel | threads | registers | limit | spilled |", "|---|---|---|---|---|"]
    own = {label: [_only(kernels, pattern) for pattern in patterns] for label, patterns in ROWS.items()}
    for label, several in [*own.items(), *((label, [made]) for label, made in mlx_kernels().items())]:
        found = [counted(made) for made in several]
        columns = (
            [prod(made.threadgroup) for made in several],
            [each.count for each in found],
            [limit(made.threadgroup) for made in several],
        )
        spilled = max(each.spilled for each in found)
        lines.append(f"| {label} | {' | '.join(' / '.join(map(str, _once(c))) for c in columns)} | {spilled} B |")
    return lines


def _only(kernels: Mapping[str, Specialisation], pattern: str) -> Specialisation:
    (found,) = (made for name, made in kernels.items() if re.fullmatch(pattern, name))
    return found


def _once(column: list[int]) -> list[int]:
    return column[:1] if len(set(column)) == 1 else column


def main() -> None:
    print(*table(shipped()), sep="\n")


if __name__ == "__main__":
    main()
