"""A kernel that fails on this Mac, even in the midst of an answer, is left out, and the answer goes on as it was."""

import json
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from metal_kernels._choices import Choices, choices
from mlx_qwen.generation import batch_generate, generate, stream_generate
from mlx_qwen.model import Model
from mlx_qwen.model.proving import leave_out_failing, prove, recalled, settle_kernels, table
from mlx_qwen.remembered import _file
from tests.engine.conftest import Loaded
from tests.support.metal_devices import Device, running_on

PROMPT = list(range(10, 30))


@pytest.fixture(autouse=True)
def _nothing_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MLX_QWEN_KERNELS", raising=False)
    monkeypatch.delenv("MLX_QWEN_TUNE", raising=False)


@pytest.fixture
def model(loaded: Loaded) -> Iterator[Model]:
    yield loaded.model
    loaded.model._current = None


def test_the_kernels_are_tried_once_and_what_was_found_is_remembered(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(builds_badly=frozenset({"_swiglu_rows"}))
    monkeypatch.setattr("metal_kernels.tuning.seconds_of", device.clock)
    with running_on(device):
        prove(model, clock=device.clock)
        tried = len(device.launched)
        settle_kernels(model)
        assert list(choices().left_out) == ["swiglu"]
        assert len(device.launched) == tried


def test_another_machine_or_kernel_text_is_tried_again(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    with running_on(device):
        prove(model, clock=device.clock)
        assert recalled(model) is not None
        monkeypatch.setattr("mlx_qwen.model.proving._source_hash", lambda: "other")
        assert recalled(model) is None


@pytest.mark.parametrize("content", ["{", "5", "{}", '{"left_out": 3}'])
def test_a_damaged_memory_is_none(model: Model, content: str) -> None:
    device = Device()
    with running_on(device):
        prove(model, clock=device.clock)
        (file,) = _file("kernels/x").parent.glob("*.json")
        known = json.loads(file.read_text())
        file.write_text(content)
        assert recalled(model) is None
        file.write_text(json.dumps({**known, "most_threads": {"rms_norm": "many"}}))
        assert recalled(model) is None


def test_one_line_says_which_kernel_is_left_out_and_why(model: Model, capfd: pytest.CaptureFixture[str]) -> None:
    device = Device(fails_at_eval=frozenset({"_attention_epilogue"}))
    with running_on(device):
        tuned = prove(model, clock=device.clock)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "left out" in line]
    assert "attention_epilogue" in line
    assert "Command buffer execution failed" in line
    rows = table(tuned.rows).splitlines()
    assert len(rows) == 1 + len(tuned.rows)
    assert any("attention_epilogue" in row and "left out" in row for row in rows)


@pytest.mark.parametrize("variable", [("MLX_QWEN_TUNE", "0"), ("MLX_QWEN_KERNELS", "metal")])
def test_nothing_is_tried_when_the_user_says_so(
    model: Model, monkeypatch: pytest.MonkeyPatch, variable: tuple[str, str]
) -> None:
    monkeypatch.setenv(*variable)
    device = Device()
    with running_on(device):
        settle_kernels(model)
        assert choices() == Choices()
    assert device.launched == []


def test_nothing_is_tried_where_there_is_no_metal(model: Model) -> None:
    settle_kernels(model)
    assert choices() == Choices()
    assert not leave_out_failing(model)


@pytest.mark.parametrize("after", [0, 1, 4])
@pytest.mark.parametrize("mtp", [False, 3])
def test_an_answer_goes_on_when_a_kernel_fails_in_its_midst(
    loaded: Loaded, model: Model, after: int, mtp: bool | int, capfd: pytest.CaptureFixture[str]
) -> None:
    options = {"temperature": 0, "max_tokens": 8, "mtp": mtp}
    expected = [r.token for r in stream_generate(model, loaded.processor, PROMPT, **options)]  # type: ignore[arg-type]
    model.engine, device, written = None, Device(), []
    with running_on(device):
        for response in stream_generate(model, loaded.processor, PROMPT, **options):  # type: ignore[arg-type]
            written.append(response.token)
            if len(written) == after + 1:
                device.fails_at_eval = frozenset({"_gated_delta_mixer"})
        failed = "gated_delta_mixer" in choices().left_out
    assert written == expected
    # Few tokens may all be computed before the first of them is read.
    assert failed == ("gated_delta_mixer" in capfd.readouterr().err)


def test_answers_of_a_batch_and_on_a_cache_of_ones_own_go_on_too(loaded: Loaded, model: Model) -> None:
    prompts = [PROMPT, PROMPT[5:], PROMPT[:3]]
    expected = batch_generate(model, loaded.processor, prompts, temperature=0, max_tokens=6)
    device = Device(fails_at_eval=frozenset({"_attention_prologue", "_add_rms_norm"}))
    model.engine = None
    with running_on(device):
        assert batch_generate(model, loaded.processor, prompts, temperature=0, max_tokens=6) == expected
        assert {"attention_prologue", "add_rms_norm"} <= choices().left_out.keys()
    model.engine = None
    with running_on(Device(fails_at_eval=frozenset({"_gated_delta_mixer"}))):
        cache = model.make_cache()
        found = generate(model, loaded.processor, PROMPT, temperature=0, max_tokens=6, prompt_cache=cache)
    assert found == expected[0]
    assert cache.offset == len([token for token in cache.tokens if token >= 0][: cache.offset])


def test_an_error_that_is_no_kernels_reaches_the_caller(loaded: Loaded, model: Model) -> None:
    def broken(tokens: mx.array, logits: mx.array) -> mx.array:
        raise ValueError("mine")

    with running_on(Device()), pytest.raises(ValueError, match="mine"):
        generate(model, loaded.processor, PROMPT, max_tokens=3, logits_processors=[broken])


@pytest.mark.parametrize(
    "part", ["prefix.PrefixIndex.take", "prefix.PrefixIndex.insert", "wired.WiredMemory.raise_limit"]
)
def test_nobody_waits_for_an_answer_that_an_error_has_ended(
    loaded: Loaded, model: Model, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    def fails(*_: object) -> None:
        raise MemoryError("none is left")

    expected = generate(model, loaded.processor, PROMPT, temperature=0, max_tokens=3)
    model.engine = None
    with monkeypatch.context() as patch:
        patch.setattr(f"mlx_qwen.engine.{part}", fails)
        with pytest.raises(MemoryError, match="none is left"):
            generate(model, loaded.processor, PROMPT, max_tokens=3)
    assert generate(model, loaded.processor, PROMPT, temperature=0, max_tokens=3) == expected
