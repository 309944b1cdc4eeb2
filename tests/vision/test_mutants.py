"""300 damaged files, drawn with a fixed seed: each is read as something, or refused with one error, and soon."""

import copy
import io
import json
import random
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen.convert import describe
from mlx_qwen.errors import MLXQwenError
from mlx_qwen.loading import load
from mlx_qwen.media.images import ImageProcessor
from mlx_qwen.media.patches import Patches
from mlx_qwen.media.videos import VideoProcessor
from mlx_qwen.options import GenerationOptions
from mlx_qwen.prompt.inputs import prompt_inputs
from tests.vision.drawing import drawing
from tests.vision.films import animation, film, video_file

SEED = 20260101
SECONDS_EACH = 10
ODD: list[object] = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 64, 1.5, -0.5, 1e308, float("nan"), float("inf"), 10**12, 10**400),
    *("", "x", "full_attention", "qwen3_5", "../..", "\ud800", "\0", [], [[]], [1], [None], ["x"], {}, {"": {}}),
    *({"text_config": {}}, {"quant_method": "gptq"}, {"rope_type": "yarn"}, [{}] * 3, [10**9] * 3, "a" * 10_000),
]


@contextmanager
def soon() -> Iterator[None]:
    """Fail whatever takes longer than a few seconds."""

    def late(*_: object) -> None:
        raise TimeoutError(f"not done after {SECONDS_EACH} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS_EACH)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The bytes with some of them changed, lost, doubled or cut off, mostly near the start."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        at = int(len(changed) * rng.random() ** 3)
        length = rng.choice((1, 1, 4, 50))
        match rng.randrange(5):
            case 0:
                changed[at : at + length] = rng.randbytes(length)
            case 1:
                del changed[at : at + length]
            case 2:
                changed[at:at] = changed[at : at + length]
            case 3:
                changed[at : at + 4] = rng.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\1"))
            case _:
                del changed[max(at, 1) :]
    return bytes(changed)


def odd_value(content: Any, rng: random.Random) -> Any:
    """The JSON value with one of its parts, at any depth, replaced or removed."""
    content = copy.deepcopy(content)
    place: Any = content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return rng.choice(ODD)
        key = rng.choice(keys)
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.8:
            place = place[key]
            continue
        if isinstance(place, dict) and rng.random() < 0.2:
            del place[key]
        else:
            place[key] = rng.choice(ODD)
        return content


def odd_json(data: bytes, rng: random.Random) -> bytes:
    content = odd_value(json.loads(data), rng)
    return json.dumps(content).encode()


def odd_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header says another thing."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if rng.random() < 0.3:
        header["__metadata__"] = rng.choice(ODD)
    else:
        header = odd_value(header, rng)
    written = json.dumps(header).encode()
    return len(written).to_bytes(8, "little") + written + data[8 + length :]


def use(folder: Path) -> None:
    """Load the folder, read a prompt with a picture, run it, and plan its conversion."""
    model, processor = load(folder)
    prompt = [{"role": "user", "content": [{"type": "image", "image": drawing(16, 24)}, {"type": "text", "text": "?"}]}]
    read = prompt_inputs(processor, prompt, GenerationOptions())
    logits = model(mx.array([read.ids[:8]]))
    assert logits.shape == (1, min(8, len(read.ids)), model.config.text.vocab_size)
    describe(folder, recipe="4bit", progress=False)


Mutate = Callable[[bytes, random.Random], bytes]
FILES: dict[str, tuple[str, Mutate, int]] = {
    "headers": ("model.safetensors", odd_header, 40),
    "weights": ("model.safetensors", damaged, 15),
    "config values": ("config.json", odd_json, 60),
    "config bytes": ("config.json", damaged, 10),
    "index": ("model.safetensors.index.json", odd_json, 20),
    "tokenizer": ("tokenizer.json", odd_json, 20),
    "template": ("chat_template.jinja", damaged, 20),
    "tokenizer settings": ("tokenizer_config.json", odd_json, 10),
    "picture settings": ("preprocessor_config.json", odd_json, 15),
    "video settings": ("video_preprocessor_config.json", odd_json, 15),
}
PICTURES, VIDEOS = 45, 30


@pytest.fixture(scope="module")
def folder(seeing_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that may be damaged, with every file that can be."""
    copied = shutil.copytree(seeing_folder, tmp_path_factory.mktemp("mutants") / "model")
    names = dict.fromkeys(mx.load(str(copied / "model.safetensors")), "model.safetensors")
    (copied / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    for name in ("tokenizer_config.json", "generation_config.json"):
        if not (copied / name).exists():
            (copied / name).write_text('{"eos_token": "<|im_end|>", "eos_token_id": [1, 2], "temperature": 0.7}')
    use(copied)
    return copied


def outcome(work: Callable[[], object]) -> str | None:
    """What went otherwise than it may: a mutant is used, or refused by an error of ours."""
    try:
        with warnings.catch_warnings(), soon():
            warnings.simplefilter("ignore")
            work()
    except MLXQwenError as error:
        return None if len(str(error)) < 3000 else f"an error of {len(str(error)):,} characters"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_file_of_a_checkpoint_is_used_or_refused(kind: str, folder: Path) -> None:
    name, mutate, count = FILES[kind]
    rng = random.Random(f"{SEED} {kind}")
    whole = (folder / name).read_bytes()
    wrong = {}
    try:
        for index in range(count):
            (folder / name).write_bytes(mutate(whole, rng))
            found = outcome(lambda: use(folder))
            if found is not None:
                wrong[index] = found
    finally:
        (folder / name).write_bytes(whole)
    assert wrong == {}


def pictures() -> list[bytes]:
    encoded = []
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "AVIF", "BMP"):
        buffer = io.BytesIO()
        drawing(40, 30).save(buffer, kind)
        encoded.append(buffer.getvalue())
    return [*encoded, *(animation(film(5, 30, 20), kind, milliseconds=50) for kind in ("GIF", "WEBP", "PNG"))]


def sound(patches: Patches) -> None:
    values = np.array(patches.pixel_values)
    assert len(values) == sum(grid.patches for grid in patches.grids) > 0
    assert np.isfinite(values).all() and np.abs(values).max() <= 1.001


def test_a_damaged_picture_is_read_or_refused() -> None:
    rng, wholes, wrong = random.Random(f"{SEED} pictures"), pictures(), {}
    processor = ImageProcessor()
    for index in range(PICTURES):
        data = damaged(wholes[index % len(wholes)], rng)
        found = outcome(lambda data=data: sound(processor([data])))  # type: ignore[misc]
        found = found or outcome(lambda data=data: sound(VideoProcessor()(data)))  # type: ignore[misc]
        if found is not None:
            wrong[index] = found
    assert wrong == {}


def test_a_damaged_video_is_read_or_refused(tmp_path: Path) -> None:
    codecs = {"a.mp4": "libx264", "b.mkv": "mpeg4", "c.webm": "libvpx", "d.avi": "mpeg4", "e.mov": "mpeg4"}
    wholes = [video_file(tmp_path / name, film(8, 32, 32), rate=8, codec=codec) for name, codec in codecs.items()]
    rng, wrong = random.Random(f"{SEED} videos"), {}
    for index in range(VIDEOS):
        data = damaged(wholes[index % len(wholes)].read_bytes(), rng)
        found = outcome(lambda data=data: sound(VideoProcessor()(data)))  # type: ignore[misc]
        if found is not None:
            wrong[index] = found
    assert wrong == {}


def test_there_are_three_hundred() -> None:
    assert sum(count for _, _, count in FILES.values()) + PICTURES + VIDEOS == 300


def test_a_fault_or_a_hang_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.SECONDS_EACH", 1)

    def endless() -> None:
        while True:
            pass

    assert "TimeoutError" in str(outcome(endless))
    assert "JSONDecodeError" in str(outcome(lambda: json.loads("{")))
    assert outcome(lambda: ImageProcessor()([b"no picture"])) is None
