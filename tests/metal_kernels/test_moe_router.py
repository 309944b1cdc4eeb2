"""The router's kernel chooses the experts that a stable sort of their probabilities puts last."""

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import OpStats, reset_stats, stats
from metal_kernels.moe_dispatch import reference, route
from tests.metal_emulator import KernelError, emulated
from tests.metal_kernels.moe_layers import as_numpy, edited_kernels, normal

ORDERS = ("forward", "reverse", "random")


@pytest.fixture(autouse=True)
def _metal_backend(monkeypatch):
    monkeypatch.setenv("MLX_QWEN_KERNELS", "metal")
    reset_stats()


def expected_choice(logits, k):
    """Indices by a stable ascending sort, and scores that add up to 1, in fp64."""
    experts = as_numpy(logits)[:, :-1]
    probabilities = np.exp(experts - experts.max(axis=-1, keepdims=True))
    indices = np.argsort(probabilities, axis=-1, kind="stable")[:, -k:]
    chosen = np.take_along_axis(probabilities, indices, axis=-1)
    return indices, chosen / chosen.sum(axis=-1, keepdims=True)


def check_route(logits, k):
    indices, scores = expected_choice(logits, k)
    for found in (route(logits, k), reference.route(logits, k, normalize=True)):
        assert (found.indices.dtype, found.scores.dtype) == (mx.uint32, mx.float32)
        assert np.array_equal(np.array(found.indices), indices)
        assert np.allclose(np.array(found.scores), scores, rtol=1e-6, atol=0)
        assert np.allclose(np.array(found.shared_score), 1 / (1 + np.exp(-as_numpy(logits)[:, -1:])), rtol=1e-6)


@pytest.mark.parametrize(
    ("E", "k", "dtype"),
    [(256, 8, mx.bfloat16), (512, 10, mx.float32), (8, 3, mx.float32), (33, 16, mx.float16), (31, 1, mx.float32)],
)
def test_the_choice_and_its_scores_are_those_of_a_stable_sort(E, k, dtype):
    with emulated() as report:
        check_route(normal(1, E + 1, dtype=dtype, scale=3.0), k)
        check_route(normal(11, E + 1, dtype=dtype, seed=1), k)
    assert report.count("mlx_qwen_route") == report.count() == 2
    assert stats() == {"route": OpStats(kernel=2)}


@pytest.mark.parametrize("order", ORDERS)
def test_of_equal_logits_the_higher_experts_win_in_ascending_order(order):
    equal = mx.zeros((1, 81))
    few_values = mx.round(normal(6, 81))
    with emulated(checked=True, order=order):
        assert route(equal, 4).indices.tolist() == [[76, 77, 78, 79]]
        check_route(few_values, 4)


def test_experts_whose_probability_vanishes_are_ties():
    logits = normal(8, 81, scale=1000.0)
    with emulated():
        assert mx.array_equal(route(logits, 4).indices, reference.route(logits, 4, normalize=True).indices)


def test_one_logit_that_is_not_a_number_makes_ties_of_all():
    logits = mx.where(mx.arange(81) == 7, float("nan"), normal(1, 81))
    with emulated():
        found = route(logits, 4)
    assert found.indices.tolist() == reference.route(logits, 4, normalize=True).indices.tolist() == [[76, 77, 78, 79]]
    assert mx.all(mx.isnan(found.scores)).item()


def test_scores_stay_probabilities_when_they_are_not_normalized():
    logits = normal(3, 81)
    with emulated():
        found = route(logits, 4, normalize=False)
    assert mx.allclose(found.scores, reference.route(logits, 4, normalize=False).scores, rtol=1e-6, atol=0)
    assert mx.all(found.scores.sum(axis=-1) < 0.9).item()


@pytest.mark.parametrize("order", ORDERS)
def test_strided_logits_are_read_in_place(order):
    wide = normal(3, 200, dtype=mx.bfloat16)
    with emulated(checked=True, order=order) as report:
        check_route(wide[:, 10:91], 4)
        check_route(normal(81, 3, dtype=mx.bfloat16).T, 4)
    assert report.launches[0].buffers["logits"].size > 2 * 200 * 2


@pytest.mark.parametrize(
    ("logits", "k", "because"),
    [
        (normal(2, 82), 17, "more than 16 of 1024 experts"),
        (normal(2, 1026), 2, "more than 16 of 1024 experts"),
        (mx.zeros((2, 82), mx.int32), 2, "logits of mlx.core.int32"),
        (mx.zeros((0, 82)), 2, "empty input"),
    ],
    ids=["too many chosen", "too many experts", "whole numbers", "no token"],
)
def test_what_the_kernel_does_not_take_is_counted(logits, k, because):
    with emulated() as report:
        found = route(logits, k)
    assert mx.array_equal(found.indices, reference.route(logits, k, normalize=True).indices)
    assert (report.count(), stats()["route"]) == (0, OpStats(reference={because: 1}))


@pytest.mark.parametrize("k", [0, 9])
def test_an_impossible_number_of_experts_is_refused(k):
    with pytest.raises(ValueError, match=f"k is {k}, expected 1 to 8"):
        route(mx.zeros((1, 9)), k)


@pytest.mark.parametrize(
    ("sound", "broken", "kind"),
    [
        (
            "expert < E ? float(logits[expert * stride])",
            "true ? float(logits[expert * stride])",
            "out of bounds",
        ),
        ("if (lane < k) {", "if (lane <= k) {", "double write"),
    ],
    ids=["experts that are not there", "one lane too many"],
)
def test_a_broken_router_is_caught(monkeypatch, sound, broken, kind):
    with (
        edited_kernels(monkeypatch, sound, broken),
        emulated(checked=True),
        pytest.raises(KernelError) as caught,
    ):
        route(normal(2, 41), 4)
    assert caught.value.kind == kind


def test_a_router_that_prefers_the_lower_of_two_equals_is_caught(monkeypatch):
    with edited_kernels(monkeypatch, "left[i] >= best", "left[i] > best"), emulated():
        assert route(mx.zeros((1, 81)), 4).indices.tolist() != [[76, 77, 78, 79]]
