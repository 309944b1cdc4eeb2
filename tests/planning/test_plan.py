"""A plan answers what fits, and says clearly what it cannot answer."""

import json
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_qwen.errors import MLXQwenError, PromptError
from mlx_qwen.planning import CHIPS, Plan, PlanningError, plan, source
from mlx_qwen.planning.chips import GIB, machine
from mlx_qwen.sizes import SIZES, released
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


@pytest.mark.parametrize(("memory", "best"), [("8GB", 3), ("12GB", 6), ("16GB", 8), ("64GB", 16)])
def test_the_best_precision_fits_and_the_next_does_not(memory: str, best: int) -> None:
    result = plan("9B", memory=memory, context=4096)
    assert result.best_bits == best
    assert plan("9B", memory=memory, context=4096, bits=best).fits
    better = {3: 4, 6: 8, 8: 16, 16: None}[best]
    assert better is None or not plan("9B", memory=memory, context=4096, bits=better).fits


def test_nothing_fits_a_machine_that_is_too_small() -> None:
    result = plan("397B-A17B", memory="16GB")
    assert (result.fits, result.largest_context, result.best_bits) == (False, None, None)
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


def impossible(**changes: object) -> Plan:
    return plan(**{"model": "0.8B", "memory": "16GB", **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "7B"}, "0.8B, 2B, 4B"),
        ({"bits": 7}, "2, 3, 4, 5, 6, 8, 16"),
        ({"context": 0}, "between 1 and"),
        ({"context": 262_145}, "262,144"),
        ({"memory": "much"}, "64GB"),
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


def test_weights_of_another_runtime_are_planned_from_the_configuration(tmp_path: Path) -> None:
    config = {**released("0.8B").raw, "quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    result = plan(tmp_path, context=16, memory="16GB")
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
    for part in ("Activations", "Largest context", "Best precision", "not measurements", "398 launches"):
        assert part in table
