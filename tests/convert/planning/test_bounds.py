"""Bounds follow from bytes, arithmetic and launches, and no published rate exceeds them."""

import pytest

from mlx_qwen.checkpoint.released import released
from mlx_qwen.convert.planning import CHIPS, Plan, plan


def planned(model: str, chip: str, *, bits: int = 4, context: int = 1024) -> Plan:
    return plan(model, bits=bits, context=context, chip=chip, memory="512GB")


def test_decode_is_bound_by_the_bytes_of_a_token() -> None:
    (bound,) = planned("9B", "M4 Pro").bounds
    assert bound.decode == pytest.approx(273e9 / planned("9B", "M4 Pro").work.decode_bytes)


def test_a_token_of_35b_moves_the_known_bytes() -> None:
    assert planned("35B-A3B", "M4", context=1).work.decode_bytes == pytest.approx(1.78e9, rel=0.03)


def test_a_longer_context_bounds_decoding_and_prefill_further() -> None:
    rates = [planned("9B", "M1 Max", context=context).bounds[0] for context in (1024, 32_768, 262_144)]
    for values in ([rate.decode for rate in rates], [rate.prefill for rate in rates]):
        assert values == sorted(values, key=float, reverse=True)  # type: ignore[arg-type]


def test_prefill_is_bound_by_two_operations_a_weight_and_token() -> None:
    work = planned("27B", "M2 Ultra", context=1).work
    parameters = 26.9e9 - 248_320 * 5120
    assert work.prefill_flops == pytest.approx(2 * parameters, rel=0.02)


def test_prefill_is_left_open_where_no_arithmetic_rate_is_published() -> None:
    assert planned("9B", "M5 Max").bounds[0].prefill is None
    given = plan("9B", context=1024, chip="M5 Max", memory="128GB", tflops=50.0)
    assert given.bounds[0].prefill == pytest.approx(50e12 * 1024 / given.work.prefill_flops)


# Rates that other projects published for these chips, without speculation.
@pytest.mark.parametrize(
    ("model", "bits", "chip", "tokens_per_second"),
    [("35B-A3B", 4, "M3 Ultra", 143.4), ("35B-A3B", 4, "M5 Max", 133.5), ("27B", 8, "M3 Ultra", 19.8)],
)
def test_published_rates_stay_below_the_bound(model: str, bits: int, chip: str, tokens_per_second: float) -> None:
    assert tokens_per_second < planned(model, chip, bits=bits).bounds[0].decode


def test_an_unknown_chip_gets_the_bounds_of_all() -> None:
    assert [bound.chip for bound in plan("0.8B", context=16, memory="8GB").bounds] == list(CHIPS)


def test_the_launch_budget_is_the_time_that_bandwidth_leaves_to_a_launch() -> None:
    result = planned("35B-A3B", "M4 Max")
    (bound,) = result.bounds
    assert bound.launch_budget * result.work.launches == pytest.approx(1 / bound.decode)


@pytest.mark.parametrize("size", ["0.8B", "9B", "35B-A3B"])
def test_launches_are_those_counted_in_the_graph(size: str) -> None:
    from mlx_qwen.bench.launches import count_launches
    from mlx_qwen.checkpoint.layout import Quantization
    from mlx_qwen.convert.planning.bounds import launches
    from mlx_qwen.convert.recipes import uniform

    packed = uniform(Quantization(bits=4, group_size=64)).precision
    assert launches(released(size).text) == count_launches(size, packed).total
