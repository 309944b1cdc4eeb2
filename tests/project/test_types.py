"""What a strict type checker tells someone who uses the package."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import mlx_qwen

model, processor = mlx_qwen.load()
text: str = mlx_qwen.generate(model, processor, "hi", temperature=0, kv_bits=4, prompt_cache=model.make_cache())
for response in mlx_qwen.stream_generate(model, processor, [1, 2], stop=["a"], max_pixels=100, progress=True):
    calls: tuple[mlx_qwen.ToolCall, ...] = response.tool_calls
texts: list[str] = mlx_qwen.batch_generate(model, processor, ["a", "b"], seed=1)
ends = [one.finish_reason for one in mlx_qwen.batch_generate(model, processor, ["a"], return_responses=True)]
talk = mlx_qwen.Conversation(model, processor, mlx_qwen.GenerationOptions(max_tokens=3), top_p=0.5)
path = mlx_qwen.convert("a", "b", bits=4).path, mlx_qwen.convert.convert("a", "b").path
table = mlx_qwen.plan("27B").table()
"""

MISTAKES = {
    'mlx_qwen.generate(model, processor, "hi", temprature=0)': 'did you mean "temperature"?',
    'mlx_qwen.generate(model, processor, "hi", max_tokens="5")': 'expected "int"',
    'mlx_qwen.stream_generate(model, processor, "hi", tools=[print])': "List item 0 has incompatible type",
    'mlx_qwen.stream_generate(model, processor, "hi", kv_bit=4)': 'did you mean "kv_bits"?',
    'mlx_qwen.batch_generate(model, processor, ["hi"], top_k=None, prefill_step_size=None)': "No overload variant",
    "mlx_qwen.Conversation(model, processor, max_token=3)": 'did you mean "max_tokens"?',
    "mlx_qwen.GenerationOptions(sed=3)": 'did you mean "seed"?',
    'mlx_qwen.load(dtype="float16")': 'expected "Dtype | None"',
    'mlx_qwen.generate(processor, model, "hi")': 'expected "Model"',
    'mlx_qwen.convert("a", "b", bit=4)': 'did you mean "bits"?',
    "mlx_qwen.generat": 'has no attribute "generat"',
}


def test_strict_mypy_knows_every_keyword(tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    (installed / "mlx_qwen").mkdir(parents=True)
    for part in (ROOT / "mlx_qwen").iterdir():
        (installed / "mlx_qwen" / part.name).symlink_to(part)
    (installed / "mlx_qwen" / "convert").symlink_to(ROOT / "convert")
    (installed / "metal_kernels").symlink_to(ROOT / "metal_kernels")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM + "\n".join(MISTAKES))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--strict",
            "--follow-imports=silent",
            "--cache-dir",
            str(tmp_path),
            str(program),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={"MYPYPATH": str(installed)},
        cwd=tmp_path,
    )
    complaints: dict[int, str] = {}
    for line in done.stdout.splitlines():
        place, _, complaint = line.partition(": error: ")
        if complaint:
            number = int(place.split(":")[1])
            complaints[number] = complaints.get(number, "") + complaint
    first = PROGRAM.count("\n") + 1
    assert sorted(complaints) == list(range(first, first + len(MISTAKES))), done.stdout + done.stderr
    for number, (statement, complaint) in enumerate(MISTAKES.items(), first):
        assert complaint in complaints[number], statement
