"""Tokens of a verify step are taken back by replaying the kept ones: in the emulator and in plain MLX."""

import mlx.core as mx
import pytest

from metal_kernels import OpStats, reset_stats, stats
from metal_kernels._choices import Choices, chosen
from metal_kernels.gated_delta import Tape, roll_back
from tests.metal_emulator import emulated
from tests.metal_kernels.gated_delta.mixer_calls import (
    call,
    in_one_launch,
    in_reference,
    layer_inputs,
    reference,
    tokens,
)
from tests.metal_kernels.gated_delta.rule_oracle import as_numpy, relative_error


@pytest.fixture(autouse=True)
def _fresh_counts():
    reset_stats()
    yield
    reset_stats()


@pytest.fixture(params=["reference", "kernel"])
def run(request):
    """`run(op, ...)` by plain MLX or as one launch."""
    return in_reference if request.param == "reference" else in_one_launch


def test_rolling_back_to_any_token_equals_having_run_only_those(run):
    inputs = layer_inputs(5, B=2)
    before = inputs["conv_state"], inputs["state"]
    tape = run(call, **inputs, tape=True).tape
    for kept in range(1, 6):
        conv_state, state = run(roll_back, tape, kept, *before)
        expected = reference(**tokens(inputs, kept))
        assert mx.array_equal(conv_state, expected.conv_state)
        assert relative_error(state, as_numpy(expected.state)) < 2e-6


def test_rolling_back_everything_gives_the_states_from_before():
    inputs = layer_inputs(2)
    before = inputs["conv_state"], inputs["state"]
    conv_state, state = roll_back(reference(**inputs, tape=True).tape, 0, *before)
    assert conv_state is before[0]
    assert state is before[1]


def test_sequences_of_a_batch_roll_back_each_to_its_own_token(run):
    inputs = layer_inputs(4, B=3, Hk=1, Hv=3, Dv=64) | {
        "mask": mx.array([[True] * 4, [False] * 2 + [True] * 2, [True] * 4])
    }
    before = inputs["conv_state"], inputs["state"]
    tape = reference(**inputs, tape=True).tape
    conv_state, state = run(roll_back, tape, mx.array([0, 4, 2]), *before)
    for i, kept in enumerate([0, 4, 2]):
        expected_conv_state, expected_state = in_reference(roll_back, tape, kept, *before)
        assert mx.array_equal(conv_state[i], expected_conv_state[i])
        assert relative_error(state[i], as_numpy(expected_state[i])) < 1e-6


@pytest.mark.parametrize(("threads", "groups"), [(128, 2), (64, 4), (96, 3)])
def test_the_rows_of_a_head_may_be_split_over_threadgroups(monkeypatch, threads, groups):
    inputs = layer_inputs(3, B=2, Dv=64)
    given = reference(**inputs, tape=True).tape, mx.array([1, 3]), inputs["conv_state"], inputs["state"]
    expected = in_one_launch(roll_back, *given)
    monkeypatch.setenv("MLX_QWEN_KERNELS", "metal")
    with chosen(Choices(most_threads={"roll_back": threads})), emulated(checked=True) as report:
        found = roll_back(*given)
    assert report.launches[0].grid == (threads * groups, 4, 2)
    assert all(mx.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_a_rollback_has_no_fault_and_no_difference_in_any_order_of_threads(order):
    inputs = layer_inputs(3, B=2)
    given = reference(**inputs, tape=True).tape, mx.array([1, 3]), inputs["conv_state"], inputs["state"]
    found, expected = (in_one_launch(roll_back, *given, checked=checked, order=order) for checked in (True, False))
    assert all(mx.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_rollback_reads_strided_arrays_where_they_lie():
    plain = layer_inputs(4, B=2)
    before = plain["conv_state"], plain["state"]
    tape = reference(**plain, tape=True).tape
    kept = mx.array([3, 1])
    strided = [mx.contiguous(x.swapaxes(0, 1)).swapaxes(0, 1) for x in (*tape, *before)]
    strided[0], strided[1] = (mx.repeat(x, 2, axis=-1)[..., ::2] for x in tape[:2])
    given = Tape(*strided[:4]), mx.array([3, 9, 1, 9])[::2], *strided[4:]
    expected = in_one_launch(roll_back, tape, kept, *before)
    found = in_one_launch(roll_back, *given)
    assert all(mx.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kept", [-1, 3])
def test_a_rollback_to_a_token_that_is_not_on_the_tape_is_refused(kept):
    inputs = layer_inputs(2)
    with pytest.raises(ValueError, match=f"kept is {kept}, expected 0 to the 2 tokens"):
        roll_back(reference(**inputs, tape=True).tape, kept, inputs["conv_state"], inputs["state"])


def test_a_rollback_that_the_kernel_does_not_take_runs_as_the_reference_and_is_counted(monkeypatch):
    inputs = layer_inputs(2, Dv=36)
    tape = reference(**inputs, tape=True).tape
    reset_stats()
    monkeypatch.setenv("MLX_QWEN_KERNELS", "metal")
    roll_back(tape, 1, inputs["conv_state"], inputs["state"])
    assert stats() == {"roll_back": OpStats(kernel=0, reference={"head size not a multiple of 32 up to 256": 1})}


def test_a_tape_is_far_smaller_than_the_states_it_stands_for():
    tape = reference(**layer_inputs(4, Hk=16, Hv=32, Dk=128, Dv=128), tape=True).tape
    states = 4 * 32 * 128 * 128 * 4
    assert 80 * (tape.k.nbytes + tape.delta.nbytes + tape.log_decay.nbytes) < states
