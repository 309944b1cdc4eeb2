"""gated_delta_rule against an fp64 loop and the two torch forms of transformers."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers.models.qwen3_5 import modeling_qwen3_5

from metal_kernels.gated_delta import gated_delta_rule
from tests.metal_kernels.gated_delta.rule_oracle import as_numpy, exact_rule, random_inputs, relative_error

TOLERANCE = 2e-6
LENGTHS = [1, 2, 7, 8, 31, 32, 33, 63, 64, 65, 130, 257]


@pytest.fixture(autouse=True)
def _reference_backend(monkeypatch):
    monkeypatch.setenv("MLX_QWEN_KERNELS", "reference")


@pytest.mark.parametrize("state", [False, True], ids=["from zeros", "from a state"])
@pytest.mark.parametrize("T", LENGTHS)
def test_every_length_equals_the_exact_loop(T, state):
    inputs = random_inputs(T, B=2, state=state, seed=T)
    y, last = inputs.call(gated_delta_rule)
    expected_y, expected_last = exact_rule(inputs)
    assert relative_error(y, expected_y) < TOLERANCE
    assert relative_error(last, expected_last) < TOLERANCE


@pytest.mark.parametrize(("Hk", "Hv"), [(1, 1), (3, 3), (2, 4), (1, 3), (2, 6)])
@pytest.mark.parametrize(("Dk", "Dv"), [(16, 16), (8, 24), (24, 8), (5, 7), (1, 3)])
def test_any_head_counts_and_sizes(Hk, Hv, Dk, Dv):
    for T in (1, 5, 37):
        inputs = random_inputs(T, Hk=Hk, Hv=Hv, Dk=Dk, Dv=Dv)
        y, last = inputs.call(gated_delta_rule)
        expected_y, expected_last = exact_rule(inputs)
        assert relative_error(y, expected_y) < TOLERANCE
        assert relative_error(last, expected_last) < TOLERANCE


@pytest.mark.parametrize("form", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
@pytest.mark.parametrize("T", [1, 7, 64, 130])
def test_equals_transformers(form, T):
    inputs = random_inputs(T, B=2, seed=T)
    q, k, v, log_decay, beta, state = (
        torch.from_numpy(np.array(x))
        for x in (inputs.q, inputs.k, inputs.v, inputs.log_decay, inputs.beta, inputs.state)
    )
    expected_y, expected_last = getattr(modeling_qwen3_5, form)(
        q,
        k,
        v,
        g=log_decay,
        beta=beta,
        initial_state=state.swapaxes(-1, -2),
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    y, last = inputs.call(gated_delta_rule)
    assert relative_error(y, expected_y.numpy()) < 1e-5
    assert relative_error(last, expected_last.swapaxes(-1, -2).numpy()) < 1e-5


@pytest.mark.parametrize("cuts", [[64], [1, 2], [7, 33, 100], list(range(1, 130))], ids=str)
def test_pieces_equal_the_whole(cuts):
    inputs = random_inputs(130, state=False)
    y, last = inputs.call(gated_delta_rule)
    state, pieces = None, []
    for start, stop in zip([0, *cuts], [*cuts, 130], strict=True):
        piece, state = inputs.tokens(start, stop, state).call(gated_delta_rule)
        pieces.append(piece)
    assert relative_error(mx.concatenate(pieces, axis=1), as_numpy(y)) < TOLERANCE
    assert relative_error(state, as_numpy(last)) < TOLERANCE


@pytest.mark.parametrize(("T", "padding"), [(1, 3), (7, 1), (40, 30), (70, 64)])
def test_left_padding_changes_nothing_for_the_tokens_after_it(T, padding):
    padded = random_inputs(T + padding, state=False)
    mask = mx.arange(T + padding)[None] >= padding
    y, last = replace(padded, mask=mask).call(gated_delta_rule)
    alone_y, alone_last = padded.tokens(padding, T + padding, None).call(gated_delta_rule)
    assert relative_error(y[:, padding:], as_numpy(alone_y)) < TOLERANCE
    assert relative_error(last, as_numpy(alone_last)) < TOLERANCE
    assert mx.isfinite(y).all()


@pytest.mark.parametrize("T", [1, 9, 70])
def test_masked_tokens_neither_decay_nor_write_an_existing_state(T):
    inputs = random_inputs(T, B=3)
    mask = mx.array(np.random.default_rng(1).random((3, T)) < 0.5)
    mask[0] = False
    inputs = replace(inputs, mask=mask)
    y, last = inputs.call(gated_delta_rule)
    expected_y, expected_last = exact_rule(inputs)
    real = np.array(mask)
    assert np.abs(as_numpy(y)[real] - expected_y[real]).max(initial=0) < 1e-5
    assert relative_error(last, expected_last) < TOLERANCE
    assert mx.array_equal(last[0], inputs.state[0])


@pytest.mark.parametrize("T", [1, 33, 130])
def test_decay_so_strong_that_it_underflows_stays_finite_and_exact(T):
    inputs = random_inputs(T, decay=(-50.0, 0.0))
    y, last = inputs.call(gated_delta_rule)
    expected_y, expected_last = exact_rule(inputs)
    assert relative_error(y, expected_y) < TOLERANCE
    assert relative_error(last, expected_last) < TOLERANCE


def test_weak_decay_right_after_strong_decay_keeps_its_precision():
    inputs = random_inputs(64, decay=(-1e-3, 0.0))
    strong = mx.arange(64) % 16 == 0
    inputs = replace(inputs, log_decay=mx.where(strong[None, :, None], -200.0, inputs.log_decay))
    y, _ = inputs.call(gated_delta_rule)
    assert relative_error(y, exact_rule(inputs)[0]) < TOLERANCE


def test_error_does_not_grow_over_a_long_sequence_that_hardly_decays():
    inputs = random_inputs(2000, Hk=1, Hv=2, Dk=8, Dv=8, decay=(-1e-4, 0.0))
    y, last = inputs.call(gated_delta_rule)
    expected_y, expected_last = exact_rule(inputs)
    assert relative_error(y, expected_y) < 4e-6
    assert relative_error(last, expected_last) < 4e-6


def test_identical_keys_written_with_full_strength_stay_exact():
    inputs = random_inputs(96, decay=(0.0, 0.0))
    same = mx.broadcast_to(inputs.k[:, :1], inputs.k.shape)
    inputs = replace(inputs, k=same, beta=mx.ones_like(inputs.beta))
    y, last = inputs.call(gated_delta_rule)
    expected_y, expected_last = exact_rule(inputs)
    assert relative_error(y, expected_y) < TOLERANCE
    assert relative_error(last, expected_last) < TOLERANCE


@pytest.mark.parametrize("T", [1, 40])
def test_bf16_inputs_lose_nothing_but_the_rounding_of_y(T):
    inputs = random_inputs(T, dtype=mx.bfloat16)
    y, last = inputs.call(gated_delta_rule)
    expected_y, expected_last = exact_rule(inputs)
    assert y.dtype == mx.bfloat16
    assert last.dtype == mx.float32
    assert np.all(np.abs(as_numpy(y) - expected_y) <= np.abs(expected_y) * 2**-8 + 1e-5)
    assert relative_error(last, expected_last) < TOLERANCE


@pytest.mark.parametrize("T", [1, 40])
def test_strided_inputs_are_read_in_place(T):
    inputs = random_inputs(T)
    width = 2 * 2 * 16 + 4 * 8
    row = mx.zeros((1, T, width + 5))
    row[..., :32], row[..., 32:64], row[..., 64:width] = (x.reshape(1, T, -1) for x in (inputs.q, inputs.k, inputs.v))
    views = replace(
        inputs,
        q=row[..., :32].reshape(1, T, 2, 16),
        k=row[..., 32:64].reshape(1, T, 2, 16),
        v=row[..., 64:width].reshape(1, T, 4, 8),
        log_decay=mx.contiguous(inputs.log_decay.swapaxes(1, 2)).swapaxes(1, 2),
        state=mx.contiguous(inputs.state.swapaxes(2, 3)).swapaxes(2, 3),
    )
    for found, expected in zip(views.call(gated_delta_rule), inputs.call(gated_delta_rule), strict=True):
        assert relative_error(found, as_numpy(expected)) < TOLERANCE


def test_an_empty_key_is_not_divided_by_zero():
    inputs = random_inputs(3)
    y, last = replace(inputs, k=mx.zeros_like(inputs.k), q=mx.zeros_like(inputs.q)).call(gated_delta_rule)
    assert mx.isfinite(last).all()
    assert mx.array_equal(y, mx.zeros_like(y))


def test_shapes_that_do_not_fit_are_named():
    inputs = random_inputs(3)
    with pytest.raises(ValueError, match=r"beta is \(1, 2, 4\), expected \(1, 3, 4\)"):
        replace(inputs, beta=inputs.beta[:, :2]).call(gated_delta_rule)
    with pytest.raises(ValueError, match="4 value heads cannot share 3 key heads"):
        three = mx.zeros((1, 3, 3, 16))
        replace(inputs, q=three, k=three).call(gated_delta_rule)


@pytest.mark.parametrize("Hk", [1, 2, 3])
@pytest.mark.parametrize("cores", [1, 2])
def test_a_long_sequence_is_the_same_on_one_core_and_on_two(monkeypatch, cores, Hk):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    inputs = random_inputs(300, B=2, Hk=Hk, Hv=2 * Hk)
    y, last = inputs.call(gated_delta_rule)
    expected_y, expected_last = exact_rule(inputs)
    assert relative_error(y, expected_y) < TOLERANCE
    assert relative_error(last, expected_last) < TOLERANCE


def test_the_rule_runs_in_any_thread():
    inputs = random_inputs(300)
    expected = as_numpy(inputs.call(gated_delta_rule)[0])
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(lambda: as_numpy(inputs.call(gated_delta_rule)[0])).result()
    assert np.array_equal(found, expected)
