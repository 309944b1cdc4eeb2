"""A prompt cache in a file is read back bit for bit, or refused with one error."""

from collections.abc import Callable
from pathlib import Path
from random import Random

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

from mlx_qwen.checkpoint.identity import model_identity
from mlx_qwen.config import ModelConfig
from mlx_qwen.engine import sealed
from mlx_qwen.engine.state_files import (
    load_prompt_cache,
    load_state,
    save_prompt_cache,
    save_state,
)
from mlx_qwen.errors import PromptError
from mlx_qwen.loading import load_model
from mlx_qwen.model import Model
from mlx_qwen.model.cache import kv_packing
from mlx_qwen.model.state import State, empty_state

Checkpoint = Callable[..., Path]


def load(path: Path) -> Model:
    return load_model(path, ModelConfig.from_directory(path))


def read(model: Model, ids: list[int], *, kv_bits: int | None = None) -> State:
    packing = kv_packing(model.config.text, kv_bits)
    state = model.step(mx.array([ids]), empty_state(model.config.text, packing, mtp=model.mtp is not None)).state
    mx.eval(state.arrays())
    return state


def held(state: State) -> list[mx.array]:
    """Every array that the state remembers, of keys and values the tokens that count."""
    rows = [
        rows
        for chains, layers in ((state.chains, 1), (state.mtp, 1))
        for chain in chains
        for layer in range(layers)
        if (rows := chain.read(layer)) is not None
    ]
    parts = [part for each in rows for part in (each if isinstance(each, tuple) else [each])]
    linear = [part for entry in state.linear for part in entry]
    return [*parts, *linear, *(part for part in (state.last, state.padding) if part is not None)]


def assert_same(found: State, expected: State) -> None:
    assert [chain.length for chain in found.chains] == [chain.length for chain in expected.chains]
    assert [chain.length for chain in found.mtp] == [chain.length for chain in expected.mtp]
    assert (found.rope_delta, found.chains[0].packing) == (expected.rope_delta, expected.chains[0].packing)
    for left, right in zip(held(found), held(expected), strict=True):
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        assert np.array_equal(*(np.array(mx.contiguous(each).reshape(-1).view(mx.uint8)) for each in (left, right)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv_bits", [None, 4, 8])
def test_a_state_is_read_back_bit_for_bit(
    checkpoint: Checkpoint, tmp_path: Path, dtype: str, kv_bits: int | None
) -> None:
    model = load(checkpoint("dense", with_mtp=True, dtype=dtype))
    ids = list(range(300 - 1))
    state = read(model, ids, kv_bits=kv_bits)
    save_state(tmp_path / "cache.safetensors", state, ids, identity="this model")
    found = load_state(tmp_path / "cache.safetensors", identity="this model")
    assert found.ids == ids
    assert_same(found.state, state)
    following = [model.step(mx.array([[5, 6, 7]]), each).hidden for each in (found.state, state)]
    assert np.array_equal(np.array(following[0]), np.array(following[1]))


def test_a_single_token_a_batch_and_padding_are_read_back(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model, file = load(checkpoint("dense", with_mtp=True)), tmp_path / "cache"
    mask = mx.array([[False, True, True], [True, True, True]])
    padded = model.step(mx.array([[0, 5, 6], [7, 8, 9]]), empty_state(model.config.text), mask=mask).state
    joined = State.joined([read(model, [1, 2]), read(model, [3])])
    for state in (read(model, [1]), joined, padded):
        save_state(file, state, [])
        found = load_state(file)
        assert found.ids == []
        assert_same(found.state, state)


def test_an_images_positions_are_read_back(tmp_path: Path, checkpoint: Checkpoint) -> None:
    state = read(load(checkpoint("dense")), [1, 2, 3])
    moved = State(state.chains, state.linear, (-7,), None, state.last)
    save_state(tmp_path / "cache", moved, [1, 2, 3])
    assert load_state(tmp_path / "cache").state.rope_delta == (-7,)


def test_a_cache_that_calls_change_is_saved_with_its_tokens(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = load(checkpoint("moe"))
    cache = model.make_cache(kv_bits=8, kv_group_size=32)
    model(mx.array([[4, 5, 6]]), cache)
    cache.tokens = [4, 5, 6]
    save_prompt_cache(tmp_path / "cache", cache)
    loaded = load_prompt_cache(tmp_path / "cache", model)
    assert (loaded.tokens, loaded.offset) == ([4, 5, 6], 3)
    assert np.array_equal(*(np.array(model(mx.array([[7]]), each)) for each in (loaded, cache)))


def test_the_file_is_plain_safetensors(checkpoint: Checkpoint, tmp_path: Path) -> None:
    state = read(load(checkpoint("dense", dtype="bfloat16")), [1, 2, 3])
    save_state(tmp_path / "cache", state, [1, 2, 3])
    with safe_open(tmp_path / "cache", "pt") as file:
        assert file.metadata()["format"] == "mlx-qwen prompt cache"
        assert file.get_tensor("ids").tolist() == [1, 2, 3]
        assert file.get_slice("chains.0.0.rows").get_shape() == [2, 1, 2, 3, 32]
    read_by_mlx = mx.load(str(tmp_path / "cache"), format="safetensors")
    assert mx.array_equal(read_by_mlx["last"], state.last)


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    file, random = tmp_path / "cache", Random(0)
    tensors = {"a": mx.arange(40, dtype=mx.float32), "b": mx.array([[1.0, 2.0]]).astype(mx.bfloat16)}
    sealed.write(file, tensors, {"what": "a test", "state": "{}"})
    assert sealed.read(file)[1] == {"what": "a test", "state": "{}"}
    content = file.read_bytes()
    for at in range(len(content)):
        for change in {0x01, 0x20, 0x29, 0xFF, random.randrange(1, 256)}:
            file.write_bytes(content[:at] + bytes([content[at] ^ change]) + content[at + 1 :])
            with pytest.raises(sealed.DamagedError):
                sealed.read(file)


@pytest.mark.parametrize("keep", [0, 7, 8, 200, -1])
def test_a_shorter_or_longer_file_is_refused(tmp_path: Path, checkpoint: Checkpoint, keep: int) -> None:
    file = tmp_path / "cache"
    save_state(file, read(load(checkpoint("dense")), [1, 2, 3]), [1, 2, 3])
    content = file.read_bytes()
    for changed in (content[:keep], content + b" "):
        file.write_bytes(changed)
        with pytest.raises(PromptError, match="no prompt cache of mlx-qwen, or damaged"):
            load_state(file)


def test_what_is_no_cache_of_this_model_is_refused(tmp_path: Path, checkpoint: Checkpoint) -> None:
    state, file = read(load(checkpoint("dense")), [1, 2, 3]), tmp_path / "cache"
    save_state(file, state, [], identity="this")
    with pytest.raises(PromptError, match="of another model"):
        load_state(file, identity="that")
    with pytest.raises(PromptError, match="cannot be read"):
        load_state(tmp_path / "missing")
    sealed.write(file, {"last": mx.zeros(3)}, {"format": "mlx-qwen prompt cache", "version": "2"})
    with pytest.raises(PromptError, match="in version 2, expected 'mlx-qwen prompt cache' in version 1"):
        load_state(file)
    mx.save_safetensors(str(tmp_path / "other.safetensors"), {"last": mx.zeros(3)})
    with pytest.raises(PromptError, match="holds no digest"):
        load_state(tmp_path / "other.safetensors")


def test_an_empty_cache_and_a_folder_that_is_not_there_are_one_error(tmp_path: Path, checkpoint: Checkpoint) -> None:
    model = load(checkpoint("dense"))
    with pytest.raises(PromptError, match="nothing was read yet"):
        save_prompt_cache(tmp_path / "cache", model.make_cache())
    with pytest.raises(PromptError, match="cannot be written"):
        save_state(tmp_path / "missing" / "cache", read(model, [1]), [1])


def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, file = read(load(checkpoint("dense")), [1, 2, 3]), tmp_path / "cache"
    save_state(file, state, [1, 2, 3])
    monkeypatch.setattr(sealed, "raw", full_disk(sealed.raw, after=9))
    with pytest.raises(PromptError, match="No space left"):
        save_state(file, state, [4, 5, 6])
    monkeypatch.undo()
    assert load_state(file).ids == [1, 2, 3]
    assert list(tmp_path.iterdir()) == [file]


def full_disk(original: Callable[[mx.array], memoryview], *, after: int) -> Callable[[mx.array], memoryview]:
    calls = []

    def failing(tensor: mx.array) -> memoryview:
        calls.append(1)
        if len(calls) > after:
            raise OSError(28, "No space left on device")
        return original(tensor)

    return failing


def test_a_models_identity_changes_with_its_files_and_precision(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for file in checkpoint("dense").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    known = {model_identity(tmp_path, mx.float32)}
    assert known == {model_identity(tmp_path, mx.float32)}
    known.add(model_identity(tmp_path, mx.bfloat16))
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    config.write_bytes(config.read_bytes() + b" ")
    known.add(model_identity(tmp_path, mx.float32))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    known.add(model_identity(tmp_path, mx.float32))
    assert len(known) == 4
