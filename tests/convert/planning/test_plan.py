"""A plan answers what fits, and says clearly what it cannot answer."""

import json
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_qwen.checkpoint.released import SIZES, released
from mlx_qwen.convert.planning import CHIPS, Plan, PlanningError, plan, room_for_weights
from mlx_qwen.convert.planning import described as source
from mlx_qwen.convert.planning.machine import GIB, machine
from mlx_qwen.convert.planning.weight_sizes import LADDER
from mlx_qwen.errors import MLXQwenError, PromptError, ShardingError
from tests.conftest import CheckpointFactory
from tests.support.checkpoints import KINDS


@pytest.mark.parametrize("name", SIZES)
def test_memory_never_falls_with_context(name: str) -> None:
    totals = [plan(name, context=context, memory="64GB").total for context in (1, 257, 32_768, 262_144)]
    assert totals == sorted(totals)
    assert totals[0] < totals[-1]


def test_the_largest_context_fits_and_one_token_more_does_not() -> None:
    largest = plan("27B", memory="32GB").largest_context
    assert largest is not None and 1 < largest < 262_144
    assert plan("27B", memory="32GB", context=largest).fits
    assert not plan("27B", memory="32GB", context=largest + 1).fits


def test_the_largest_context_is_at_most_the_models_own() -> None:
    assert plan("0.8B", memory="128GB").largest_context == 262_144


@pytest.mark.parametrize(
    ("memory", "best"), [("8GB", "3bit"), ("12GB", "6bit"), ("16GB", "8bit"), ("64GB", "unpacked")]
)
def test_the_best_recipe_fits_and_every_larger_one_does_not(memory: str, best: str) -> None:
    assert plan("9B", memory=memory, context=4096).best_recipe == best
    plans = {name: plan("9B", memory=memory, context=4096, recipe=name) for name in LADDER}
    assert plans[best].fits
    assert not any(each.fits for each in plans.values() if each.total > plans[best].total)


def test_the_converters_own_recipe_is_planned_for_when_none_is_named() -> None:
    assert plan("9B", memory="16GB").weights == plan("9B", memory="16GB", recipe="balanced").weights


def test_bits_alone_are_a_recipe_of_all_matrices_alike() -> None:
    assert plan("9B", memory="16GB", bits=6).weights == plan("9B", memory="16GB", recipe="6bit").weights
    assert plan("9B", memory="16GB", bits=16).weights.recipe == "unpacked"


@pytest.mark.parametrize("context", [4096, 131_072])
def test_weights_of_the_room_that_is_left_fill_the_machine(context: int) -> None:
    room = room_for_weights("9B", memory="24GB", context=context)
    result = plan("9B", memory="24GB", context=context)
    assert room + (result.kv + result.state + result.activations) == result.machine.usable == 16 * GIB


def test_a_context_that_leaves_no_room_for_weights_is_refused() -> None:
    with pytest.raises(PlanningError, match="shorter context"):
        room_for_weights("27B", memory="8GB", context=262_144)


def test_nothing_fits_a_machine_that_is_too_small() -> None:
    result = plan("397B-A17B", memory="16GB")
    assert (result.fits, result.largest_context, result.best_recipe) == (False, None, None)
    assert "no, " in result.table()


def test_the_total_is_the_sum_of_its_parts() -> None:
    result = plan("2B", context=1000, memory="16GB")
    parts = (result.weights.text, result.weights.mtp, result.kv, result.state, result.activations)
    assert result.total == sum(parts)


@pytest.mark.parametrize(
    ("memory", "usable"), [("24GB", 16 * GIB), ("32 GiB", 32 * GIB * 2 // 3), (64 * GIB, 48 * GIB)]
)
def test_a_macs_gpu_may_take_a_part_of_its_memory(memory: int | str, usable: int) -> None:
    assert machine(None, memory).usable == usable


def test_this_machine_is_planned_for_when_none_is_named() -> None:
    result = plan("0.8B", context=16)
    assert 0 < result.machine.usable <= result.machine.memory


@pytest.mark.parametrize(("device", "chip"), [("Apple M4 Pro", "M4 Pro"), ("Apple M99", None)])
def test_a_mac_is_asked_for_its_own_limit(device: str, chip: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    info = {"device_name": device, "memory_size": 48 * GIB, "max_recommended_working_set_size": 40 * GIB}
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: info)
    found = machine(None, None)
    assert (found.memory, found.usable) == (48 * GIB, 40 * GIB)
    assert (found.chip.name if found.chip else None) == chip


@pytest.mark.parametrize("name", ["M4 Max", "m4max", "Apple M4 Max"])
def test_a_chip_is_found_however_it_is_written(name: str) -> None:
    chip = machine(name, "64GB").chip
    assert chip is not None and chip.bandwidth == 546


def test_chips_have_names_of_their_own() -> None:
    assert len({chip.name for chip in CHIPS}) == len(CHIPS)
    assert {chip.name.split()[0] for chip in CHIPS} == {"M1", "M2", "M3", "M4", "M5"}


def test_bounds_from_unconfirmed_figures_are_marked() -> None:
    table = plan("0.8B", context=16, memory="64GB").table()
    marked = {line.split("*")[0] for line in table.splitlines() if "*" in line and not line.startswith("*")}
    assert marked == {chip.name for chip in CHIPS if chip.unconfirmed} and "no second source" in table


def impossible(**changes: object) -> Plan:
    return plan(**{"model": "0.8B", "memory": "16GB", **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "7B"}, "0.8B, 2B, 4B"),
        ({"bits": 7}, "2, 3, 4, 5, 6, 8, 16"),
        ({"recipe": "4-8"}, "mixed-4-8"),
        ({"recipe": "4bit", "bits": 4}, "Choose one"),
        ({"context": 0}, "between 1 and"),
        ({"context": 262_145}, "262,144"),
        ({"memory": "much"}, "64GB"),
        ({"memory": "10MB"}, r"a number of GB or GiB \(2\^30 bytes\)"),
        ({"memory": "0GB"}, "more than nothing"),
        ({"memory": -1}, "more than nothing"),
        ({"chip": "M9"}, "M5 Max"),
        ({"chip": "M4", "memory": None}, "--memory"),
        ({"prefill_step_size": 0}, "at least 1"),
        ({"tflops": -1.0}, "more than 0"),
    ],
    ids=str,
)
def test_an_impossible_question_is_one_clear_error(changes: dict[str, object], said: str) -> None:
    with pytest.raises(PlanningError, match=said):
        impossible(**changes)


def test_keys_and_values_that_cannot_be_packed_are_refused() -> None:
    with pytest.raises(PromptError, match="kv_bits is 3"):
        impossible(kv_bits=3)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MLXQwenError, match=r"config\.json"):
        impossible(model=tmp_path)


def test_only_the_configuration_of_a_repository_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(released("2B").raw))
    asked = []

    def resolve(model: str, *, revision: str | None, weights: bool) -> Path:
        asked.append((model, revision, weights))
        return tmp_path

    monkeypatch.setattr(source, "resolve", resolve)
    result = plan("Qwen/Qwen3.5-2B", memory="16GB", revision="main")
    assert asked == [("Qwen/Qwen3.5-2B", "main", False)]
    assert result.weights == plan("2B", memory="16GB").weights


def test_a_repository_for_another_runtime_is_planned_from_its_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**released("0.8B").raw, "quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(source, "resolve", lambda model, *, revision, weights: tmp_path)
    result = plan("Qwen/Qwen3.5-0.8B-FP8", context=16, memory="16GB")
    assert result.weights.total == plan("0.8B", context=16, memory="16GB").weights.total
    assert result.weights.source is None
    assert "unknown" in result.table()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_checkpoint_is_planned_for(kind: str, checkpoint: CheckpointFactory) -> None:
    result = plan(checkpoint(kind), memory="8GB", chip="M1")
    assert result.fits
    assert result.context == result.largest_context == 2048
    assert (result.weights.vision > 0) == kind.endswith("_vl") == ("Vision tower" in result.table())


def test_the_table_shows_every_part_and_calls_bounds_bounds() -> None:
    table = plan("35B-A3B", memory="64GB", chip="M4 Max", kv_bits=8).table()
    for part in (
        "Language model",
        "MTP layer",
        "Vision tower",
        "keys and values, packed to 8 bits",
        "Linear attention",
    ):
        assert part in table
    for part in ("Activations", "Largest context", "Best recipe", "balanced", "not measurements", "358 launches"):
        assert part in table


@pytest.mark.parametrize("name", SIZES)
def test_each_of_several_ranks_holds_less_and_all_together_hold_the_whole(name: str) -> None:
    alone, *shared = (plan(name, memory="64GB", ranks=ranks, bits=4) for ranks in (1, 2, 4, 8))
    for ranks, each in zip((2, 4, 8), shared, strict=True):
        assert ranks * each.weights.text == pytest.approx(alone.weights.text, rel=0.05)
        assert (each.weights.mtp, each.stored, ranks * each.state) == (alone.weights.mtp, alone.weights, alone.state)
        assert "ranks, which share the model" in each.table()
    assert "ranks" not in alone.table()


def test_ranks_that_do_not_divide_a_model_are_refused_by_its_plan() -> None:
    with pytest.raises(ShardingError, match="3 ranks do not divide"):
        plan("27B", memory="64GB", ranks=3)
