"""A server on two ranks, each with half of the bundled demo, answers as one process with the whole does."""

import base64
import io
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image, ImageDraw

import mlx_qwen
from mlx_qwen.cli import main
from mlx_qwen.model import Model
from mlx_qwen.prompt import Processor
from tests.distributed.processes import Ranks, ranks

Loaded = tuple[Model, Processor]
COUNT = 64
PROMPTS = ["What is 37+58?", "Name a colour, and then another one.", "Count from one to thirty:", "Once upon a time"]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:
    return mlx_qwen.load(folder)


@pytest.fixture(scope="module")
def two(folder: Path) -> Iterator[Ranks]:
    with ranks(2, "serve", "--port", 0, "--max-batch", 4, "--model", folder) as started:
        started.url()
        yield started


def asked(two: Ranks, path: str, **body: object) -> Any:
    url = f"{two.url()}/v1/{path}"
    content = json.dumps({"temperature": 0, "max_tokens": COUNT, **body}).encode()
    request = urllib.request.Request(url, content, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def completed(two: Ranks, prompt: str | list[int], **more: object) -> str:
    return str(asked(two, "completions", prompt=prompt, **more)["choices"][0]["text"])


def alone(loaded: Loaded, prompt: Any, **more: Any) -> str:
    """The text of one process, without end tokens and as the server gives it."""
    responses = list(mlx_qwen.stream_generate(*loaded, prompt, **{"temperature": 0, "max_tokens": COUNT, **more}))
    return "".join(response.delta.text for response in responses)


def test_greedy_answers_are_those_of_one_process(two: Ranks, loaded: Loaded) -> None:
    long = [(7 * i) % 200 + 3 for i in range(300)]
    assert completed(two, long) == alone(loaded, long)
    for prompt in PROMPTS:
        assert completed(two, prompt) == alone(loaded, prompt)


def test_answers_that_are_written_together_are_those_written_alone(two: Ranks, loaded: Loaded) -> None:
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        together = list(pool.map(lambda prompt: completed(two, prompt + " So"), PROMPTS))
    assert together == [alone(loaded, prompt + " So") for prompt in PROMPTS]


def test_drawn_answers_follow_their_seed_and_without_one_the_ranks_still_agree(two: Ranks, loaded: Loaded) -> None:
    sampled = {"temperature": 1.0, "seed": 7, "presence_penalty": 0.5}
    assert completed(two, PROMPTS[1], **sampled) == alone(loaded, PROMPTS[1], **sampled)
    # How many tokens are guessed ahead is now by the clock, which is rank 0's.
    with ThreadPoolExecutor(3) as pool:
        drawn = list(pool.map(lambda prompt: asked(two, "completions", prompt=prompt, temperature=1.0), PROMPTS[1:]))
    assert all(answer["choices"][0]["finish_reason"] in ("stop", "length") for answer in drawn)
    assert completed(two, PROMPTS[1]) == alone(loaded, PROMPTS[1])


def test_what_was_read_before_is_not_read_again(two: Ranks) -> None:
    prompt = [(5 * i) % 190 + 3 for i in range(200)]
    first, again = (asked(two, "completions", prompt=prompt) for _ in range(2))
    assert again["choices"] == first["choices"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 100


def test_a_schema_holds_and_the_answer_is_that_of_one_process(two: Ranks, loaded: Loaded) -> None:
    messages = [{"role": "user", "content": "Give me a JSON object."}]
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA}}
    answer = asked(two, "chat/completions", messages=messages, response_format=form)["choices"][0]["message"]["content"]
    assert set(json.loads(answer)) == {"a", "b"}
    assert answer == alone(loaded, messages, schema=SCHEMA)


def test_a_picture_is_seen_by_all_ranks(two: Ranks, loaded: Loaded) -> None:
    picture, written = Image.new("RGB", (96, 64), "white"), io.BytesIO()
    ImageDraw.Draw(picture).ellipse((20, 10, 70, 55), fill="red")
    picture.save(written, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is in the picture?"}]
    messages = [{"role": "user", "content": content}]
    answer = asked(two, "chat/completions", messages=messages)["choices"][0]["message"]["content"]
    assert answer == alone(loaded, messages)
    assert answer


def test_a_request_that_is_refused_or_left_ends_alone(two: Ranks, loaded: Loaded) -> None:
    with pytest.raises(urllib.error.HTTPError, match="400"):
        asked(two, "completions", prompt=PROMPTS[0], max_tokens=-1)
    request = json.dumps({"prompt": PROMPTS[0], "max_tokens": 4000, "stream": True, "min_p": 0.0}).encode()
    left = urllib.request.Request(f"{two.url()}/v1/completions", request, {"Content-Type": "application/json"})
    with urllib.request.urlopen(left, timeout=60) as response:
        response.readline()
    assert completed(two, PROMPTS[2]) == alone(loaded, PROMPTS[2])


def test_a_command_on_two_ranks_drafts_answers_once_and_ends_both(folder: Path, loaded: Loaded) -> None:
    with ranks(
        2,
        "generate",
        PROMPTS[2],
        "--model",
        folder,
        "--temp",
        0,
        "--mtp",
        3,
        "--max-tokens",
        COUNT,
        "--json",
        "--draft-vocabulary",
        64,
    ) as started:
        assert started.ended(60) == [0, 0]
        said = json.loads(started.out(0))
        assert started.out(1) == started.err(1) == ""
    messages = [{"role": "user", "content": PROMPTS[2]}]
    assert said["text"] == alone(loaded, messages, mtp=0)


def test_ranks_that_run_whole_layers_one_after_the_other_draft_and_answer_alike(folder: Path, loaded: Loaded) -> None:
    words = ["--model", folder, "--temp", 0, "--mtp", 2, "--max-tokens", 24, "--json", "--draft-vocabulary", 64]
    with ranks(2, "generate", PROMPTS[2], *words, "--pipeline") as started:
        assert started.ended(60) == [0, 0]
        said = json.loads(started.out(0))
    messages = [{"role": "user", "content": PROMPTS[2]}]
    assert said["text"] == alone(loaded, messages, mtp=0, max_tokens=24)


def test_one_mac_alone_has_no_layers_to_divide() -> None:
    result = CliRunner().invoke(main, ["generate", "Hi", "--pipeline"])
    assert result.exit_code == 2
    assert "--pipeline divides a model among several Macs; start the command with mlx.launch." in result.output
