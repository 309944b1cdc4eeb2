"""Registers of every kernel at the sizes of the parity cases: `python -m tests.metal_kernels.registers` prints them."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any
from unittest.mock import patch

import mlx.core as mx

from metal_kernels.gated_delta.rule.prefill import gated_delta_prefill
from metal_kernels.parity_cases import probes
from tests.metal_emulator import EmulatedKernel, emulated
from tests.metal_emulator.registers import count, limit
from tests.metal_emulator.signature import KernelSource, Signature, make_signature
from tests.metal_kernels.gated_delta.mixer_calls import call, layer_inputs
from tests.metal_kernels.gated_delta.rule_oracle import random_inputs


@dataclass(frozen=True)
class Specialisation:
    """A kernel as one call compiles it."""

    source: KernelSource
    signature: Signature
    threadgroup: tuple[int, int, int]

    @property
    def name(self) -> str:
        """The kernel's name and its template arguments."""
        return self.source.name.removeprefix("mlx_qwen_") + self.signature.template_arguments


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


def shipped() -> dict[str, Specialisation]:
    """Every kernel once: in bf16, or as the parity cases have it where they have no bf16."""
    chosen: dict[str, Specialisation] = {}
    for name, made in specialisations(_calls).items():
        anonymous = re.sub(r"\b(bfloat16_t|float16_t|float)\b", "T", name)
        if anonymous not in chosen or "bfloat16_t" in name:
            chosen[anonymous] = made
    return {made.name: made for made in chosen.values()}


def main() -> None:
    print("| kernel | threads | registers | limit | spilled |\n|---|---|---|---|---|")
    for name, made in shipped().items():
        most = limit(made.threadgroup)
        found = count(made.source, made.signature, made.threadgroup, most)
        print(f"| `{name}` | {prod(made.threadgroup)} | {found.count} | {most} | {found.spilled} B |", flush=True)


if __name__ == "__main__":
    main()
