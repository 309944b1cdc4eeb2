"""The public surface, which only grows on purpose."""

import inspect
import subprocess
import sys

import pytest

import metal_kernels
import mlx_qwen
import mlx_qwen.convert


def test_the_public_names_are_these() -> None:
    assert set(mlx_qwen.__all__) == {"GenerationResponse", "batch_generate", "generate", "load", "stream_generate"}
    assert {"ConversionReport", "convert"} <= set(mlx_qwen.convert.__all__)
    assert {"Backend", "backend", "reset_stats", "stats"} <= set(metal_kernels.__all__)


@pytest.mark.parametrize(
    "function", [mlx_qwen.load, mlx_qwen.generate, mlx_qwen.stream_generate, mlx_qwen.batch_generate]
)
def test_public_functions_are_documented_and_name_every_option(function: object) -> None:
    signature = inspect.signature(function)  # type: ignore[arg-type]
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds
    assert inspect.getdoc(function)


OPTIONS = {
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "repetition_penalty", "seed", "tools",
    "enable_thinking", "thinking_budget", "preserve_thinking", "stop", "sampler", "logits_processors", "prompt_cache",
    "prefill_step_size", "kv_bits", "images", "videos", "max_pixels", "min_pixels", "total_pixels", "fps", "min_frames",
    "max_frames", "progress",
}  # fmt: skip


def test_generation_takes_the_documented_options() -> None:
    assert set(inspect.signature(mlx_qwen.stream_generate).parameters) >= OPTIONS


def test_responses_have_mlx_lms_fields_and_more() -> None:
    names = set(mlx_qwen.GenerationResponse.__dataclass_fields__)
    mlx_lm = {"text", "token", "logprobs", "from_draft", "prompt_tokens", "prompt_tps"}
    mlx_lm |= {"generation_tokens", "generation_tps", "peak_memory", "finish_reason"}
    assert names >= mlx_lm | {"cached_tokens", "reasoning", "tool_calls"}


def test_the_converter_is_reached_from_the_package_alone() -> None:
    code = "import mlx_qwen; print(mlx_qwen.convert.convert.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "convert"
