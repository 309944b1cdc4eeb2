"""The two prefill kernels of the gated delta rule, through the emulator, beside an fp64 loop and the reference."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import OpStats, _build, reset_stats, stats
from metal_kernels._choices import Choices
from metal_kernels.gated_delta import gated_delta_rule
from metal_kernels.gated_delta.rule import prefill, reference
from metal_kernels.gated_delta.rule.prefill import chosen_form, gated_delta_prefill
from tests.metal_emulator import KernelError, emulated
from tests.metal_kernels.gated_delta.rule_oracle import as_numpy, exact_rule, random_inputs, relative_error

TOLERANCE = 1e-6
FORMS = ("sequential", "chunked")
ORDERS = ("forward", "reverse", "random")
SMALL = {"Dk": 32, "Dv": 32, "Hk": 1, "Hv": 2}

forms = pytest.mark.parametrize("form", FORMS)


def run(inputs, form, **emulator):
    with emulated(**emulator):
        y, last = gated_delta_prefill(
            inputs.q, inputs.k, inputs.v, inputs.log_decay, inputs.beta, inputs.state, inputs.mask, form=form
        )
        mx.eval(y, last)
    return y, last


def check(inputs, form, tolerance=TOLERANCE, **emulator):
    y, last = run(inputs, form, **emulator)
    expected_y, expected_last = exact_rule(inputs)
    assert y.dtype == inputs.v.dtype
    assert relative_error(y, expected_y) < tolerance
    assert relative_error(last, expected_last) < tolerance


def packed(inputs):
    """The same inputs with q, k and v as slices of one wide row, and gates as slices of a wider array."""
    B, T, Hk, Dk = inputs.q.shape
    Hv, Dv = inputs.v.shape[2:]
    row = mx.concatenate([x.reshape(B, T, -1) for x in (inputs.q, inputs.k, inputs.v)], axis=-1)
    q, k, v = mx.split(row, [Hk * Dk, 2 * Hk * Dk], axis=-1)
    gates = mx.concatenate([inputs.log_decay, inputs.beta], axis=-1)
    return replace(
        inputs,
        q=q.reshape(B, T, Hk, Dk),
        k=k.reshape(B, T, Hk, Dk),
        v=v.reshape(B, T, Hv, Dv),
        log_decay=gates[..., :Hv],
        beta=gates[..., Hv:],
    )


@forms
@pytest.mark.parametrize("T", [1, 8, 15, 16, 17, 33, 70])
def test_every_length_equals_the_exact_loop(form, T):
    check(random_inputs(T, B=2, seed=T, **SMALL), form)


@forms
def test_no_state_is_a_state_of_zeros(form):
    check(random_inputs(20, state=False, **SMALL), form)


@pytest.mark.parametrize(
    ("form", "Dk", "Dv", "Hk", "Hv"),
    [
        *[("sequential", 64, 96, 2, 2), ("sequential", 96, 64, 1, 3), ("sequential", 256, 256, 1, 1)],
        *[("chunked", 64, 96, 2, 2), ("chunked", 96, 64, 1, 3), ("chunked", 128, 256, 1, 1)],
    ],
)
def test_head_sizes_from_32_to_256_and_any_grouping(form, Dk, Dv, Hk, Hv):
    check(random_inputs(35, Dk=Dk, Dv=Dv, Hk=Hk, Hv=Hv), form)


@forms
def test_four_value_heads_can_share_a_key_head(form):
    check(random_inputs(19, B=2, **(SMALL | {"Hk": 2, "Hv": 8})), form)


@forms
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_short_types_lose_nothing_but_the_rounding_of_y(form, dtype):
    inputs = packed(random_inputs(20, B=2, dtype=dtype, **SMALL))
    y, last = run(inputs, form)
    expected_y, expected_last = exact_rule(inputs)
    half_unit = 2**-8 if dtype == mx.bfloat16 else 2**-11
    assert np.all(np.abs(as_numpy(y) - expected_y) <= np.abs(expected_y) * half_unit * 1.01 + 1e-5)
    assert relative_error(last, expected_last) < TOLERANCE


@forms
def test_masked_tokens_neither_decay_nor_write_even_when_they_are_not_numbers(form):
    inputs = random_inputs(40, B=3, **SMALL)
    mask = mx.array(np.random.default_rng(1).random((3, 40)) < 0.5)
    mask[0] = False
    expected_y, expected_last = exact_rule(replace(inputs, mask=mask))
    poison = {name: mx.where(mask[..., None, None], getattr(inputs, name), mx.nan) for name in ("q", "k", "v")}
    y, last = run(replace(inputs, mask=mask, **poison), form)
    expected_y[~np.array(mask)] = 0
    assert relative_error(y, expected_y) < TOLERANCE
    assert relative_error(last, expected_last) < TOLERANCE
    assert mx.array_equal(last[0], inputs.state[0])


@forms
@pytest.mark.parametrize("decay", [(-50.0, 0.0), (-50.0, -50.0)], ids=["mixed", "constant"])
def test_decay_so_strong_that_it_underflows_stays_exact(form, decay):
    check(random_inputs(40, B=2, decay=decay, **SMALL), form)


@forms
def test_weak_decay_right_after_strong_decay_keeps_its_precision(form):
    inputs = random_inputs(64, B=2, decay=(-1e-3, 0.0), **SMALL)
    strong = mx.arange(64) % 16 == 0
    check(replace(inputs, log_decay=mx.where(strong[None, :, None], -200.0, inputs.log_decay)), form)


@forms
def test_error_does_not_grow_over_a_long_sequence_that_hardly_decays(form):
    check(random_inputs(500, B=2, decay=(-1e-4, 0.0), **SMALL), form, tolerance=4e-6)


@forms
def test_identical_keys_written_with_full_strength_stay_exact(form):
    inputs = random_inputs(96, B=2, decay=(0.0, 0.0), **SMALL)
    same = mx.broadcast_to(inputs.k[:, :1], inputs.k.shape)
    check(replace(inputs, k=same, beta=mx.ones_like(inputs.beta)), form)


@forms
def test_pieces_equal_the_whole(form):
    inputs = random_inputs(45, B=2, **SMALL)
    y, last = run(inputs, form)
    first, state = run(inputs.tokens(0, 21, inputs.state), form)
    second, state = run(inputs.tokens(21, 45, state), form)
    assert relative_error(mx.concatenate([first, second], axis=1), as_numpy(y)) < TOLERANCE
    assert relative_error(state, as_numpy(last)) < TOLERANCE


@forms
def test_strides_of_any_kind_are_read_in_place(form):
    inputs = random_inputs(20, B=2, **SMALL)
    y, last = run(inputs, form)

    def turned(x, *axes):
        return mx.contiguous(x.swapaxes(*axes)).swapaxes(*axes)

    odd = replace(
        inputs,
        q=turned(inputs.q, 1, 3),
        k=turned(inputs.k, 0, 2),
        v=turned(inputs.v, 2, 3),
        log_decay=turned(inputs.log_decay, 1, 2),
        state=turned(inputs.state, 2, 3),
    )
    found_y, found_last = run(odd, form)
    assert mx.array_equal(found_y, y)
    assert mx.array_equal(found_last, last)


@forms
@pytest.mark.parametrize("order", ORDERS)
def test_released_head_sizes_pass_every_check_in_any_order(form, order):
    inputs = packed(random_inputs(37, Dk=128, Dv=128, Hk=1, Hv=2))
    inputs = replace(inputs, mask=mx.arange(37)[None] >= 3)
    expected_y, expected_last = inputs.call(reference.gated_delta_rule)
    y, last = run(inputs, form, checked=True, order=order)
    assert relative_error(y[:, 3:], as_numpy(expected_y[:, 3:])) < 2e-6
    assert relative_error(last, as_numpy(expected_last)) < 2e-6


@forms
def test_fewer_bytes_move_than_through_the_packed_kernel_of_mlx_lm(form, monkeypatch):
    peer = pytest.importorskip("mlx_lm.models.gated_delta")
    inputs = packed(random_inputs(64, Dk=128, Dv=128, Hk=1, Hv=2, dtype=mx.bfloat16))
    arrays = (inputs.q, inputs.k, inputs.v, inputs.log_decay, inputs.beta, inputs.state)
    with emulated(checked=True) as report:
        gated_delta_prefill(*arrays, form=form)
        monkeypatch.setattr(mx.metal, "is_available", lambda: True)
        monkeypatch.setattr(peer, "_gated_delta_kernel_packed", peer._make_gated_delta_packed_kernel())
        peer.gated_delta_kernel(*arrays)
    ours, theirs = report.launches
    assert theirs.kernel == "gated_delta_step_packed_btree"
    assert ours.bytes_read < 0.5 * theirs.bytes_read
    assert ours.bytes_written < theirs.bytes_written
    assert all(ours.buffers[name].read == ours.buffers[name].unique_read for name in ("v", "state"))


def test_many_tokens_go_through_chunks_and_few_or_wide_keys_do_not():
    assert chosen_form(Choices().chunked_from, 128) == "chunked"
    assert chosen_form(Choices().chunked_from - 1, 128) == "sequential"
    assert chosen_form(Choices().chunked_from, 160) == "sequential"


def test_chunks_of_keys_that_are_too_wide_are_refused():
    inputs = random_inputs(3, Dk=160, Dv=32)
    with pytest.raises(ValueError, match="up to 128, found 160; use the sequential form"):
        run(inputs, "chunked")


@pytest.mark.parametrize("T", [20, Choices().chunked_from + 6])
def test_the_rule_runs_as_one_kernel(monkeypatch, T):
    monkeypatch.setenv("MLX_QWEN_KERNELS", "metal")
    reset_stats()
    inputs = random_inputs(T, B=2, **SMALL)
    with emulated() as report:
        y, last = inputs.call(gated_delta_rule)
    assert [launch.kernel for launch in report.launches] == [f"mlx_qwen_gated_delta_prefill_{chosen_form(T, 32)}"]
    assert stats() == {"gated_delta_rule": OpStats(kernel=1)}
    expected_y, expected_last = exact_rule(inputs)
    assert relative_error(y, expected_y) < TOLERANCE
    assert relative_error(last, expected_last) < TOLERANCE


@pytest.mark.parametrize(
    ("change", "because"),
    [
        ({"q": mx.zeros((1, 3, 1, 16)), "k": mx.zeros((1, 3, 1, 16)), "state": None}, "head size"),
        ({"k": mx.zeros((1, 3, 1, 32), mx.bfloat16)}, "dtype"),
        ({"beta": mx.zeros((1, 3, 2), mx.bfloat16)}, "gates or state not fp32"),
    ],
    ids=["narrow heads", "mixed dtypes", "short gates"],
)
def test_what_the_kernels_do_not_take_runs_as_the_reference(monkeypatch, change, because):
    monkeypatch.setenv("MLX_QWEN_KERNELS", "metal")
    reset_stats()
    inputs = replace(random_inputs(3, **SMALL), **change)
    with emulated() as report:
        y, _ = inputs.call(gated_delta_rule)
        assert mx.array_equal(y, inputs.call(reference.gated_delta_rule)[0])
    assert report.count() == 0
    (counted,) = stats()["gated_delta_rule"].reference
    assert counted.startswith(because)


BARRIER = "metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);"
SIMD_BARRIER = "metal::simdgroup_barrier(metal::mem_flags::mem_threadgroup);"


@pytest.mark.parametrize(
    ("form", "sound", "broken", "kinds"),
    [
        ("sequential", f"lane);\n    {BARRIER}\n    for", "lane);\n    for", {"race", "uninitialised read"}),
        ("sequential", f"    {BARRIER}\n    tile.store", "    tile.store", {"race"}),
        ("sequential", "first + slot < count", "first + slot <= count", {"out of bounds", "double write"}),
        ("chunked", f"{BARRIER}\n    columns.look_up", "columns.look_up", {"race", "uninitialised read"}),
        ("chunked", f"{SIMD_BARRIER}\n          invert_block", "invert_block", {"race", "uninitialised read"}),
        ("chunked", f"{SIMD_BARRIER}\n  if (lane < 8)", "if (lane < 8)", {"race"}),
        ("chunked", "== SIMDGROUPS - 1 && lane < CHUNK", "== SIMDGROUPS - 1 && lane <= CHUNK", {"out of bounds"}),
    ],
    ids=[
        *["no barrier before tokens are used", "no barrier before y is stored", "one token too many"],
        *[
            "no barrier before the inverses are used",
            "block inverted early",
            "block overwritten early",
            "one decay too many",
        ],
    ],
)
def test_a_broken_kernel_is_caught(monkeypatch, form, sound, broken, kinds):
    text = _build.source_text
    kernel = prefill._CHUNKED if form == "chunked" else prefill._SEQUENTIAL
    assert sound in text(kernel.file)
    monkeypatch.setattr(_build, "source_text", lambda file: text(file).replace(sound, broken))
    _build._built.cache_clear()
    try:
        with pytest.raises(KernelError) as caught:
            run(random_inputs(35, Dk=32, Dv=64, Hk=1, Hv=1), form, checked=True, order="reverse")
    finally:
        _build._built.cache_clear()
    assert caught.value.kind in kinds
