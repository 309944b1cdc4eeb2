"""A few new tokens of a Gated DeltaNet layer in one kernel: in the emulator, against plain MLX."""

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import OpStats, _build, reset_stats, stats
from metal_kernels.gated_delta import MixerResult
from tests.metal_emulator import KernelError, emulated
from tests.metal_kernels.gated_delta.mixer_calls import call, in_kernel, layer_inputs, reference
from tests.metal_kernels.gated_delta.rule_oracle import as_numpy, relative_error


@pytest.fixture(autouse=True)
def _fresh_counts():
    reset_stats()
    yield
    reset_stats()


def arrays(result: MixerResult) -> dict[str, mx.array]:
    tape = {} if result.tape is None else result.tape._asdict()
    return {"y": result.y, "conv_state": result.conv_state, "state": result.state, **tape}


def check_equal(found: MixerResult, expected: MixerResult, bound=2e-6):
    found, expected = arrays(found), arrays(expected)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype), name
        assert relative_error(found[name], as_numpy(array)) < bound, name


SHAPES = {
    "heads of the released sizes": {"T": 2, "Dk": 128, "Dv": 128},
    "the widest heads, more rows than a threadgroup holds": {"T": 8, "Hk": 1, "Hv": 3, "Dk": 256, "Dv": 256},
    "odd multiples of 32": {"T": 3, "Hk": 2, "Hv": 2, "Dk": 96, "Dv": 160},
    "short keys, long values": {"T": 1, "Hk": 1, "Hv": 4, "Dk": 32, "Dv": 64},
    "two taps": {"T": 4, "W": 2},
    "more taps than tokens": {"T": 2, "W": 8},
    "hidden sizes that no SIMD group divides": {"T": 2, "hidden": 333},
    "a batch, many heads": {"T": 2, "B": 3, "Hk": 5, "Hv": 15},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_equals_the_reference(shape):
    inputs = layer_inputs(**SHAPES[shape])
    check_equal(in_kernel(**inputs), reference(**inputs))


@pytest.mark.parametrize("T", [1, 5, 6, 7, 8])
def test_a_taped_call_equals_the_reference(T):
    inputs = layer_inputs(T)
    check_equal(in_kernel(**inputs, tape=True), reference(**inputs, tape=True))


@pytest.mark.parametrize("T", [1, 6])
def test_the_reference_gives_the_same_with_and_without_a_tape(T):
    inputs = layer_inputs(T, B=2)
    mask = mx.arange(T)[None] >= mx.array([[0], [min(T - 1, 3)]])
    expected, found = reference(**inputs, mask=mask), reference(**inputs, mask=mask, tape=True)
    assert expected.tape is None
    check_equal(found._replace(tape=None), expected)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_low_precision_inputs_round_as_in_the_reference(dtype):
    inputs = layer_inputs(3, hidden=96, dtype=dtype)
    found, expected = in_kernel(**inputs), reference(**inputs)
    assert found.y.dtype == found.conv_state.dtype == dtype
    assert mx.array_equal(found.conv_state, expected.conv_state)
    assert relative_error(found.state, as_numpy(expected.state)) < 2e-6
    assert np.mean(as_numpy(found.y) == as_numpy(expected.y)) > 0.99


def test_masked_tokens_enter_neither_the_convolution_nor_the_state():
    inputs = layer_inputs(5, B=2)
    mask = mx.array([[False] * 2 + [True] * 3, [True] * 5])
    found, expected = in_kernel(**inputs, mask=mask, tape=True), reference(**inputs, mask=mask, tape=True)
    assert bool(mx.isfinite(found.y).all())
    real = np.array(mask)
    assert np.allclose(as_numpy(found.y)[real], as_numpy(expected.y)[real], atol=1e-5)
    check_equal(found._replace(y=expected.y), expected)


def test_strided_inputs_are_read_where_they_lie():
    plain = layer_inputs(3, B=2)
    wide = {name: mx.concatenate([plain[name]] * 2, axis=-1)[..., : plain[name].shape[-1]] for name in ("qkvz", "x")}
    strided = plain | wide
    for name in ("conv_weight", "conv_state", "ba_weight", "state"):
        strided[name] = mx.contiguous(plain[name].swapaxes(0, 1)).swapaxes(0, 1)
    for name in ("A_log", "norm_weight"):
        strided[name] = mx.repeat(plain[name], 2)[::2]
    columns_first = mx.contiguous(plain["state"].swapaxes(2, 3)).swapaxes(2, 3)
    mask = mx.array([[True, False, True], [True, True, False], [True, True, True]]).T[:2]
    for given in (strided, strided | {"state": columns_first}):
        check_equal(in_kernel(**given, mask=mask), in_kernel(**plain, mask=mx.contiguous(mask)), bound=1e-12)


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("taped", [False, True])
def test_no_fault_and_no_difference_in_any_order_of_threads(order, taped):
    inputs = layer_inputs(3 if taped else 1, B=2, Dv=64) | {"tape": taped}
    inputs["mask"] = mx.array([[False, True, True], [True] * 3]) if taped else None
    found, expected = in_kernel(checked=True, order=order, **inputs), in_kernel(**inputs)
    for name, array in arrays(expected).items():
        assert mx.array_equal(arrays(found)[name], array), name


def test_a_decode_step_moves_hardly_more_bytes_than_its_arrays_have(monkeypatch):
    monkeypatch.setenv("MLX_QWEN_KERNELS", "metal")
    inputs = layer_inputs(1, Hk=16, Hv=32, Dk=128, Dv=128, hidden=2048, dtype=mx.bfloat16)
    with emulated(checked=True) as report:
        call(**inputs)
    [launch] = report.launches
    unavoidable = sum(traffic.size for traffic in launch.buffers.values())
    assert launch.bytes_read + launch.bytes_written < 1.05 * unavoidable


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, "not 1 to 8 tokens"),
        ({"state": None}, "no state yet"),
        ({"ba_weight": mx.zeros((8, 24), mx.float16)}, "dtype"),
        ({"state": mx.zeros((1, 4, 32, 32), mx.bfloat16)}, "state not fp32"),
        ({"norm_weight": mx.ones(36)}, "head size not a multiple of 32 up to 256"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_kernel_does_not_take_runs_as_the_reference_and_is_counted(monkeypatch, change, reason):
    monkeypatch.setenv("MLX_QWEN_KERNELS", "metal")
    inputs = layer_inputs(9 if not change else 2, Dv=36 if "norm_weight" in change else 32) | change
    with emulated() as report:
        y = call(**inputs).y
    assert report.count("mlx_qwen_gated_delta_mixer") == 0
    assert stats()["gated_delta_mixer"] == OpStats(kernel=0, reference={reason: 1})
    assert mx.allclose(y, reference(**inputs).y, rtol=1e-5, atol=1e-6)


def test_launches_are_counted():
    in_kernel(**layer_inputs(1))
    assert stats() == {"gated_delta_mixer": OpStats(kernel=1)}


@pytest.mark.parametrize(
    ("name", "shape"), [("state", (1, 4, 32, 31)), ("x", (1, 3, 24)), ("conv_weight", (9, 4, 1)), ("mask", (2, 2))]
)
def test_a_wrong_shape_is_named_with_the_right_one(name, shape):
    with pytest.raises(ValueError, match=rf"gated_delta_mixer: {name} is \({shape[0]}, .*, expected \("):
        reference(**layer_inputs(2) | {name: mx.zeros(shape)})


# By the fault: what is changed in the kernel to what, and what the emulator calls it.
BROKEN = {
    "a missing barrier": (
        "  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);\n  finish_inputs",
        "  finish_inputs",
        "race",
    ),
    "rows past the end": ("state + row * row_stride", "state + (row + 1) * row_stride", "out of bounds"),
    "inputs of the key heads not kept": ("head.first || i >= 2 * DK", "i >= 2 * DK", "unwritten output"),
}


@pytest.fixture
def edited_source(monkeypatch):
    """`edited_source(old, new)` builds kernels from an edited copy of their source for the rest of the test."""
    original = _build.source_text

    def edit(old, new):
        def edited(file):
            text = original(file)
            assert text.count(old) == 1
            return text.replace(old, new)

        monkeypatch.setattr(_build, "source_text", edited)
        _build._built.cache_clear()

    yield edit
    _build._built.cache_clear()


@pytest.mark.parametrize("fault", BROKEN)
def test_a_fault_put_into_the_kernel_is_found(edited_source, fault):
    old, new, kind = BROKEN[fault]
    edited_source(old, new)
    with pytest.raises(KernelError) as error:
        in_kernel(checked=True, **layer_inputs(1))
    assert error.value.kind == kind
