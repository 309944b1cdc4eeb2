"""What is right is not reported."""

import mlx.core as mx
import pytest

from tests.metal_emulator.launch import Order
from tests.test_metal_emulator.kernels import ORDERS, run

SOUND = {
    "a SIMD barrier between lanes of one SIMD group": """
        threadgroup float s[64];
        s[t] = x[t];
        simdgroup_barrier(mem_flags::mem_threadgroup);
        out[t] = s[t ^ 1];
    """,
    "threadgroup memory used again after a barrier": """
        threadgroup float s[64];
        float sum = 0;
        for (int k = 0; k < 3; ++k) {
          s[t] = x[t] + k;
          threadgroup_barrier(mem_flags::mem_threadgroup);
          sum += s[63 - t];
          threadgroup_barrier(mem_flags::mem_threadgroup);
        }
        out[t] = sum;
    """,
    "an output shared after a device barrier": """
        out[t] = x[t];
        threadgroup_barrier(mem_flags::mem_device);
        float v = out[63 - t];
        threadgroup_barrier(mem_flags::mem_device);
        out[t] = v;
    """,
    "all threads writing the same value": """
        threadgroup float s;
        s = simdgroups_per_threadgroup;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        out[t] = s;
    """,
    "a thread reading back and changing its own output": "out[t] = x[t]; out[t] += 1; out[t] *= out[t];",
    "a whole SIMD group returning early": """
        out[t] = 0;
        if (t >= 32) return;
        out[t] = simd_sum(x[t]);
    """,
    "unsigned numbers wrapping around": "out[t] = float((0u - 1u) + t);",
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", SOUND)
def test_a_sound_kernel_runs_checked(case: str, order: Order) -> None:
    x = mx.arange(64).astype(mx.float32)
    checked, quick = (
        run(
            "uint t = thread_index_in_threadgroup;" + SOUND[case],
            {"x": x},
            {"out": ((64,), mx.float32)},
            grid=(64, 1, 1),
            threadgroup=(64, 1, 1),
            order=order if checked else "forward",
            checked=checked,
        )[0][0]
        for checked in (True, False)
    )
    assert mx.array_equal(checked, quick)
