"""The public surface, which only grows on purpose."""

import ast
import inspect
import pydoc
import rlcompleter
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import mlx.core as mx
import pytest

import metal_kernels
import mlx_qwen
import mlx_qwen.convert
from mlx_qwen.keywords import OptionKeywords, SettingKeywords
from mlx_qwen.media.image_sources import ImageSource
from mlx_qwen.media.video_sources import VideoSource
from mlx_qwen.options import GenerationOptions
from mlx_qwen.settings import EngineSettings

ROOT = Path(__file__).resolve().parents[2]

PUBLIC = [
    "CheckpointError",
    "ConfigError",
    "Conversation",
    "ConversionError",
    "GenerationOptions",
    "GenerationResponse",
    "MLXQwenError",
    "PlanningError",
    "PromptError",
    "ShardingError",
    "ToolCall",
    "__version__",
    "batch_generate",
    "convert",
    "generate",
    "generate_async",
    "load",
    "load_prompt_cache",
    "plan",
    "save_prompt_cache",
    "stream_generate",
    "stream_generate_async",
]


def test_the_public_names_are_these() -> None:
    assert sorted(mlx_qwen.__all__) == PUBLIC
    assert {"ConversionReport", "convert"} <= set(mlx_qwen.convert.__all__)
    assert {"Backend", "backend", "reset_stats", "stats"} <= set(metal_kernels.__all__)


def test_the_names_are_listed_completed_and_there() -> None:
    assert dir(mlx_qwen) == PUBLIC
    assert all(getattr(mlx_qwen, name) is not None for name in PUBLIC)
    completer = rlcompleter.Completer({"mlx_qwen": mlx_qwen})
    assert completer.complete("mlx_qwen.stream_g", 0) == "mlx_qwen.stream_generate("
    with pytest.raises(AttributeError, match="has no attribute 'generat'"):
        mlx_qwen.generat


def test_listing_the_names_loads_no_mlx() -> None:
    code = "import sys, mlx_qwen as m; dir(m); m.PromptError; print('mlx' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_type_checkers_see_the_names_that_are_there() -> None:
    stub = ast.parse((ROOT / "mlx_qwen" / "__init__.pyi").read_text(encoding="utf-8"))
    exported = next(node.value for node in stub.body if isinstance(node, ast.Assign))
    assert ast.literal_eval(exported) == PUBLIC
    homes = {
        alias.name: node.module
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname is None
    }
    assert sorted({*homes, "convert"}) == PUBLIC
    for name, module in homes.items():
        assert getattr(sys.modules[str(module)], name) is getattr(mlx_qwen, name), name


def test_help_shows_every_name() -> None:
    text = pydoc.plain(pydoc.render_doc(mlx_qwen))
    assert [name for name in PUBLIC if name not in text] == ["__version__"]
    assert f"VERSION\n    {mlx_qwen.__version__}\n" in text
    assert "seed: makes sampling repeatable" in text


def test_errors_are_one_tree() -> None:
    errors = [getattr(mlx_qwen, name) for name in PUBLIC if name.endswith("Error")]
    assert all(issubclass(error, mlx_qwen.MLXQwenError) for error in errors)


@pytest.mark.parametrize(
    "function",
    [
        mlx_qwen.load, mlx_qwen.generate, mlx_qwen.stream_generate, mlx_qwen.batch_generate, mlx_qwen.Conversation,
        mlx_qwen.GenerationOptions, mlx_qwen.convert, mlx_qwen.convert.convert, mlx_qwen.plan,
    ],
)  # fmt: skip
def test_public_functions_are_documented_and_name_every_option(function: object) -> None:
    signature = inspect.signature(function)  # type: ignore[arg-type]
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds
    assert inspect.getdoc(function)


OPTIONS = {
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "repetition_penalty", "seed", "tools",
    "tool_choice", "parallel_tool_calls", "schema", "response_format", "regex", "grammar",
    "enable_thinking", "thinking_budget", "close_loops", "reasoning_effort",
    "preserve_thinking", "chat_template_kwargs", "continue_final_message", "frequency_penalty", "logit_bias",
    "xtc_probability", "xtc_threshold", "logprobs", "stop", "stop_in_reasoning", "sampler",
    "logits_processors", "images", "videos", "max_pixels", "min_pixels", "total_pixels", "fps", "min_frames",
    "max_frames", "source_fps",
}  # fmt: skip
SETTINGS = {
    "prefill_step_size",
    "kv_bits",
    "max_kv_size",
    "mtp",
    "draft_model",
    "draft_vocabulary",
    "prompt_lookup",
    "num_draft_tokens",
    "prefix_cache",
    "prefix_cache_bytes",
    "prefix_cache_dir",
    "prefix_cache_dir_bytes",
    "progress",
}


def test_generation_takes_and_explains_the_documented_options() -> None:
    for function in (mlx_qwen.generate, mlx_qwen.stream_generate, mlx_qwen.batch_generate, mlx_qwen.Conversation):
        names = set(inspect.signature(function).parameters)
        assert names >= OPTIONS | SETTINGS
    for function in (mlx_qwen.generate, mlx_qwen.stream_generate):
        assert "prompt_cache" in inspect.signature(function).parameters
        doc = inspect.getdoc(function) or ""
        assert [name for name in OPTIONS | SETTINGS if f"\n    {name}: " not in doc] == []


def test_type_checkers_see_the_options_that_are_declared_with_their_types() -> None:
    unloaded = {"mx": mx, "ImageSource": ImageSource, "VideoSource": VideoSource}
    options, settings = (get_type_hints(cls, localns=unloaded) for cls in (GenerationOptions, EngineSettings))
    assert (set(options), set(settings)) == (OPTIONS, SETTINGS)
    assert get_type_hints(SettingKeywords, localns=unloaded) == settings
    assert get_type_hints(OptionKeywords, localns=unloaded) == options | settings


def test_an_option_is_named_where_it_is_declared_and_once_more_for_type_checkers() -> None:
    """Adding an option is one field and its line in a TypedDict, without which no type checker knows keywords."""
    written: dict[str, list[str]] = {name: [] for name in OPTIONS | SETTINGS}
    faces = ["options.py", "settings.py", "keywords.py", "media/limits.py", "generation.py", "conversation.py"]
    faces += [
        f"cli/{name}.py"
        for name in ("options", "flags", "generate", "chat/__init__", "chat/talk", "chat/typed", "answering")
    ]
    for face in faces:
        tree = ast.parse((ROOT / "mlx_qwen" / face).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            name = node.target if isinstance(node, ast.AnnAssign) else None
            word = name.id if isinstance(name, ast.Name) else node.arg if isinstance(node, ast.arg) else ""
            if word in written:
                written[word].append(face)
    limits = {"max_pixels", "min_pixels", "total_pixels", "fps", "min_frames", "max_frames", "source_fps"}
    for name, places in written.items():
        home = "settings.py" if name in SETTINGS else "media/limits.py" if name in limits else "options.py"
        expected = [home, "keywords.py"]
        # The command line's two commands differ in how many tokens they write unless told otherwise.
        expected += ["cli/options.py"] if name == "max_tokens" else []
        assert sorted(places) == sorted(expected), name


def test_responses_have_mlx_lms_fields_and_more() -> None:
    names = set(mlx_qwen.GenerationResponse.__dataclass_fields__)
    mlx_lm = {"text", "token", "logprobs", "from_draft", "prompt_tokens", "prompt_tps"}
    mlx_lm |= {"generation_tokens", "generation_tps", "peak_memory", "finish_reason"}
    assert names >= mlx_lm | {"cached_tokens", "reasoning", "tool_calls"}


def test_the_converter_is_reached_from_the_package_alone_and_is_called_like_mlx_lms() -> None:
    code = (
        "import mlx_qwen; print(mlx_qwen.convert.convert.__name__)\n"
        "try: mlx_qwen.convert('no such folder', 'out', bits=7)\n"
        "except mlx_qwen.ConversionError as error: print(error)\n"
        "import mlx_qwen.convert.recipes; print(mlx_qwen.convert.recipes.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    name, complaint, submodule = done.stdout.splitlines()
    assert (name, submodule) == ("convert", "mlx_qwen.convert.recipes")
    assert "bits" in complaint
    assert inspect.signature(mlx_qwen.convert) == inspect.signature(mlx_qwen.convert.convert)
