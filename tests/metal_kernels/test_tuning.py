"""Each kernel proves itself on the machine at hand: right, built, launched and quicker than plain MLX, or left out."""

import mlx.core as mx
import pytest

from metal_kernels import stats
from metal_kernels._choices import NEVER, Choices, choices, choose
from metal_kernels.calls import AttentionSizes, ExpertSizes
from metal_kernels.gated_delta import Heads
from metal_kernels.moe_dispatch import op as moe
from metal_kernels.norm import rms_norm
from metal_kernels.tuning import Tuned, failing, tune, without
from metal_kernels.tuning_cases import ModelSizes
from tests.support.metal_devices import Device, running_on

SIZES = ModelSizes(
    mx.float32,
    768,
    Heads(1, 64, 2, 64),
    4,
    AttentionSizes(4, 2, 64, 16),
    ExpertSizes(8, 2, 64, 64, 4, 32),
    None,
    vocabulary=320,
)
# A threadgroup of the mixer has 256 threads at these heads, of the norms 192.
DENSE = ModelSizes(mx.float32, 768, Heads(1, 64, 2, 64), 4, AttentionSizes(4, 2, 64, 16), None, 96)


def tuned(device: Device, sizes: ModelSizes = DENSE) -> Tuned:
    with running_on(device):
        return tune(sizes, clock=device.clock)


@pytest.fixture(scope="module")
def sound() -> Tuned:
    return tuned(Device(), SIZES)


def test_sound_kernels_are_all_used_as_they_suit(sound: Tuned) -> None:
    assert sound.choices.left_out == {}
    assert sound.choices.most_threads == {}
    tried = {row.kernel for row in sound.rows}
    assert tried >= {"attention", "packed_attention", "best_tokens"}
    assert tried >= {
        "rms_norm",
        "gated_delta_mixer",
        "roll_back",
        "route",
        "routed_gate_up",
        "expert_gate_up",
        "combine",
        "swiglu",
    }
    assert all(row.error is None or row.error < 1e-5 for row in sound.rows)


def test_a_kernel_that_cannot_be_built_is_left_out_alone() -> None:
    found = tuned(Device(builds_badly=frozenset({"_attention_prologue"}))).choices
    assert list(found.left_out) == ["attention_prologue"]
    assert "Unable to build metal library" in found.left_out["attention_prologue"]


def test_a_kernel_that_fails_when_it_is_computed_is_left_out_alone() -> None:
    found = tuned(Device(fails_at_eval=frozenset({"_gated_delta_replay"}))).choices
    assert list(found.left_out) == ["roll_back"]
    assert "Command buffer execution failed" in found.left_out["roll_back"]


def test_a_kernel_that_computes_something_else_is_left_out_alone() -> None:
    found = tuned(Device(computes_wrongly=frozenset({"_swiglu_rows"}))).choices
    assert list(found.left_out) == ["swiglu"]
    assert "differs by 1.0e+00" in found.left_out["swiglu"]


def test_a_kernel_that_is_slower_is_left_out_alone_with_both_times() -> None:
    slow = Device(seconds={"add_rms_norm, 192 threads: kernel": 3.0, "add_rms_norm, 128 threads: kernel": 4.0})
    found = tuned(slow).choices
    assert found.left_out == {"add_rms_norm": "slower: 3000.000 ms, plain MLX 2000.000 ms"}


def test_threadgroups_are_as_large_as_the_pipeline_allows() -> None:
    sizes = ModelSizes(mx.float32, 2048, Heads(1, 128, 1, 128), 4, None, None, 64)
    found = tuned(Device(most_threads=384), sizes).choices
    assert found.left_out == {}
    assert found.most_threads == {
        "rms_norm": 256,
        "add_rms_norm": 256,
        "gated_delta_mixer": 256,
        "roll_back": 256,
    }


def test_the_quickest_threadgroup_is_taken() -> None:
    found = tuned(Device(seconds={"gated_delta_mixer, 128 threads: kernel": 0.5})).choices
    assert found.most_threads == {"gated_delta_mixer": 128}


def test_the_prefill_runs_in_chunks_from_where_they_are_quicker_on() -> None:
    quick = {
        f"gated_delta_prefill_chunked, {rows} rows, {T} tokens: kernel": 0.5 for rows in (32, 64) for T in (256, 1024)
    }
    assert tuned(Device(seconds=quick)).choices.chunked_from == 256
    assert tuned(Device()).choices.chunked_from == NEVER


def test_the_prefill_takes_the_rows_that_are_quicker() -> None:
    quick = {"gated_delta_prefill_sequential, 32 rows, 1024 tokens: kernel": 0.5}
    assert tuned(Device(seconds=quick)).choices.prefill_rows == 32


@pytest.mark.parametrize(("bad", "crossing"), [("sequential", 0), ("chunked", NEVER)])
def test_one_form_of_the_prefill_stands_in_for_the_other(bad: str, crossing: int) -> None:
    found = tuned(Device(fails_at_eval=frozenset({f"_gated_delta_prefill_{bad}"}))).choices
    assert list(found.left_out) == [f"gated_delta_prefill_{bad}"]
    assert found.chunked_from == crossing


def test_plain_mlx_prefills_where_both_forms_fail() -> None:
    found = tuned(Device(builds_badly=frozenset({"_gated_delta_prefill_sequential", "_gated_delta_prefill_chunked"})))
    assert "gated_delta_rule" in found.choices.left_out


@pytest.mark.parametrize(("kernel", "alone"), [("_decode_attention", False), ("_packed_decode_attention", True)])
def test_attention_is_left_out_where_its_kernel_differs(kernel: str, alone: bool) -> None:
    # Both kernels' names end with that of the plain one.
    found = tuned(Device(computes_wrongly=frozenset({kernel}))).choices
    assert set(found.left_out) == ({"packed_attention"} if alone else {"attention", "packed_attention"})


def test_long_contexts_are_split_over_as_many_threadgroups_as_are_quickest(sound: Tuned) -> None:
    assert sound.choices.attention_groups == 64
    quick = Device(seconds={"attention, 256 threadgroups: kernel": 0.5})
    assert tuned(quick).choices.attention_groups == 256


def test_experts_are_sorted_from_where_that_is_quicker_on() -> None:
    slow = {f"sparse_mlp, kernels, {rows} rows: kernel": 3.0 for rows in (8, 16, 32)}
    assert tuned(Device(seconds=slow), SIZES).choices.expert_rows == 4


def test_more_rows_than_sixteen_may_run_as_the_experts_two_kernels(sound: Tuned) -> None:
    assert sound.choices.expert_rows == 128
    with running_on(Device()):
        choose(Choices(expert_rows=128))
        hidden = moe.expert_gate_up
        assert hidden is not None
        assert moe._unmultipliable(mx.zeros((17, 64)), 2, *[_dense()] * 2) is None
        assert "more than 128 rows" in str(moe._unmultipliable(mx.zeros((129, 64)), 2, *[_dense()] * 2))


def _dense() -> moe.ExpertWeights:
    return moe.ExpertWeights(mx.zeros((64, 64)))


def test_what_is_left_out_runs_as_plain_mlx_and_says_why() -> None:
    x, weight = mx.ones((2, 64)), mx.ones(64)
    device = Device()
    with running_on(device):
        choose(Choices(left_out={"rms_norm": "slower"}))
        rms_norm(x, weight, 1e-6, mx.float32)
        assert stats()["rms_norm"].reference["slower"] >= 1
    assert device.launched == []


def test_kernels_that_fail_later_are_found_and_only_those() -> None:
    with running_on(Device(fails_at_eval=frozenset({"_rms_norm"}))):
        # `add_rms_norm` ends so too.
        assert set(failing(DENSE)) == {"rms_norm", "add_rms_norm"}
        choose(without(choices(), failing(DENSE)))
        assert failing(DENSE) == {}


def test_routing_is_joined_to_the_experts_where_that_is_quicker(sound: Tuned) -> None:
    assert "routed_gate_up" not in sound.choices.left_out
    slow = {"routed_gate_up, one row: kernel": 3.0}
    found = tuned(Device(seconds=slow), SIZES).choices
    assert found.left_out == {"routed_gate_up": "slower than route and expert_gate_up one after the other"}


def test_a_dense_mlp_is_one_kernel_up_to_as_many_rows_as_that_is_quicker() -> None:
    assert tuned(Device()).choices.mlp_rows == 8
    slow = {f"mlp_gate_up, kernel, {rows} rows: kernel": 3.0 for rows in (4, 8)}
    assert tuned(Device(seconds=slow)).choices.mlp_rows == 2


def test_a_kernel_is_not_compared_with_others_that_fail() -> None:
    device = Device(builds_badly=frozenset({"_swiglu_rows"}))
    found = tuned(device, SIZES).choices
    assert list(found.left_out) == ["swiglu"] and found.expert_rows == 128
