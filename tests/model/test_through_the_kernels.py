"""The whole model through its Metal kernels, in the emulator, computes what it computes through the references."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch

from metal_kernels import reset_stats, stats
from metal_kernels.moe_dispatch import ExpertWeights
from mlx_qwen.config import ModelConfig
from mlx_qwen.convert import convert
from mlx_qwen.loading import load_model
from mlx_qwen.model import Model
from mlx_qwen.model.layers import QuantizedExpertLinear
from mlx_qwen.model.mlp import SparseMoE
from tests.metal_emulator import emulated
from tests.support.checkpoints import Kind, reference_model
from tests.support.ranks import in_threads

Checkpoint = Callable[..., Path]
Run = Callable[[], np.ndarray]
KINDS: tuple[Kind, ...] = ("dense", "moe", "next")
TOLERANCE = 1e-5
PACKINGS = [
    *(("affine", bits, 32) for bits in (3, 5, 6, 8)),
    *(("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)),
]
# Why an operation may run as its reference: the first tokens have no state, and long pieces are for the prefill kernel.
ALLOWED = {"no state yet", "not 1 to 8 tokens"}


def load(path: Path) -> Model:
    return load_model(path, ModelConfig.from_directory(path))


def tokens(T: int, rows: int = 1) -> mx.array:
    return mx.array(np.random.default_rng(T).integers(0, 299, (rows, T)))


def in_pieces(
    model: Model, ids: mx.array, edges: list[int], mask: np.ndarray | None = None, kv_bits: int | None = None
) -> np.ndarray:
    """Logits of `ids`, fed from edge to edge; the first pieces are padded as `mask` says."""
    cache, pieces = model.make_cache(kv_bits=kv_bits, kv_group_size=32), []
    for a, b in pairwise(edges):
        part = None if mask is None or mask[:, a:b].all() else mx.array(mask[:, a:b])
        pieces.append(model(ids[:, a:b], cache, mask=part))
        mx.eval(pieces[-1], cache.arrays())
    return np.array(mx.concatenate(pieces, axis=1))


def through_kernels(monkeypatch: pytest.MonkeyPatch, run: Run) -> np.ndarray:
    """What `run` computes with every operation as a kernel, but for the reasons in `ALLOWED`."""
    monkeypatch.setenv("MLX_QWEN_KERNELS", "metal")
    reset_stats()
    with emulated() as report:
        found = run()
    counts = stats()
    assert report.count("mlx_qwen_gated_delta_mixer") and report.count("mlx_qwen_attention_prologue")
    assert counts["attention"].kernel if "attention" in counts else counts["packed_attention"].kernel
    assert {reason for op in counts.values() for reason in op.reference} <= ALLOWED, counts
    monkeypatch.setenv("MLX_QWEN_KERNELS", "reference")
    return found


def assert_equal(found: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_in_pieces_then_decoding(monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint, kind: Kind) -> None:
    model, ids = load(checkpoint(kind)), tokens(80)
    edges = [0, 66, 75, 76, 77, 80]
    found = through_kernels(monkeypatch, lambda: in_pieces(model, ids, edges))
    assert_equal(found, in_pieces(model, ids, edges))


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_are_within_the_models_bounds_of_transformers(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint, kind: Kind
) -> None:
    path, ids = checkpoint(kind), tokens(40)
    found = through_kernels(monkeypatch, lambda: in_pieces(load(path), ids, [0, 37, 38, 40]))
    with torch.no_grad():
        expected = reference_model(path)(input_ids=torch.tensor(np.array(ids)), use_cache=False).logits.numpy()
    assert_equal(found, expected, tolerance=2e-4)


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_attention_that_is_split_over_threadgroups(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint, kv_bits: int | None
) -> None:
    monkeypatch.setattr("metal_kernels.attention.decode.kernel._FEWEST_KEYS", 16)
    model, ids, mask = load(checkpoint("dense")), tokens(80, rows=2), np.arange(80) >= np.array([[0], [40]])
    edges = [0, 72, 73, 77, 80]
    found = through_kernels(monkeypatch, lambda: in_pieces(model, ids, edges, mask, kv_bits))
    tolerance = TOLERANCE if kv_bits is None else 1e-2
    assert_equal(found[mask], in_pieces(model, ids, edges, mask, kv_bits)[mask], tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_a_left_padded_batch(monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint, kind: Kind) -> None:
    model, ids, mask = load(checkpoint(kind)), tokens(24, rows=2), np.arange(24) >= np.array([[0], [5]])
    edges = [0, 20, 21, 24]
    found = through_kernels(monkeypatch, lambda: in_pieces(model, ids, edges, mask))
    assert_equal(found[mask], in_pieces(model, ids, edges, mask)[mask])


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_and_packed_keys(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint, tmp_path: Path, bits: int
) -> None:
    convert(checkpoint("moe"), tmp_path / "packed", bits=bits, group_size=32, progress=False)
    model, ids, edges = load(tmp_path / "packed"), tokens(12), [0, 9, 10, 11, 12]
    found = through_kernels(monkeypatch, lambda: in_pieces(model, ids, edges))
    assert_equal(found, in_pieces(model, ids, edges))
    # A last bit of a key can round it to the next of 256 steps.
    found = through_kernels(monkeypatch, lambda: in_pieces(model, ids, edges, kv_bits=8))
    assert_equal(found, in_pieces(model, ids, edges, kv_bits=8), tolerance=1e-2)


def pack_experts(model: Model, packing: tuple[str, int, int]) -> None:
    """Pack the matrices of the sparse layers."""
    mode, bits, group = packing
    for layer in model.layers:
        assert isinstance(layer.mlp, SparseMoE)
        experts, shared = layer.mlp.switch_mlp, layer.mlp.shared_expert
        for name in ("gate_up_proj", "down_proj"):
            packed = QuantizedExpertLinear(group, bits, mode)
            packed.weight, packed.scales, *biases = mx.quantize(experts[name].weight, group, bits, mode)
            if biases:
                packed.biases = biases[0]
            experts[name] = packed
        shared.gate_up_proj.parts = [part.to_quantized(group, bits, mode) for part in shared.gate_up_proj.parts]
        shared.down_proj = shared.down_proj.to_quantized(group, bits, mode)


def unpacked(matrix: ExpertWeights) -> torch.Tensor:
    """The numbers that a packed matrix holds."""
    assert matrix.scales is not None
    packing = matrix.group_size, matrix.bits, matrix.mode
    numbers = mx.dequantize(matrix.weight, matrix.scales, matrix.biases, *packing)
    return torch.tensor(np.array(numbers.astype(mx.float32)))


def give_experts(reference: torch.nn.Module, model: Model) -> None:
    """Let transformers' sparse layers have the numbers that the model's packed matrices hold."""
    for theirs, layer in zip(reference.model.layers, model.layers, strict=True):
        weights, mlp = layer.mlp.weights, theirs.mlp
        gate, up = unpacked(weights.shared_gate_up[0]).chunk(2)
        given = {
            "experts.gate_up_proj": unpacked(weights.gate_up),
            "experts.down_proj": unpacked(weights.down),
            "shared_expert.gate_proj.weight": gate,
            "shared_expert.up_proj.weight": up,
            "shared_expert.down_proj.weight": unpacked(weights.shared_down),
        }
        for name, numbers in given.items():
            parameter = mlp.get_parameter(name)
            assert parameter.shape == numbers.shape
            parameter.data = numbers


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_experts_of_every_precision_are_within_the_models_bounds_of_transformers(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint, packing: tuple[str, int, int]
) -> None:
    path = checkpoint("moe", layers=2, interval=2)
    reference, model, ids = reference_model(path), load(path), tokens(8)
    pack_experts(model, packing)
    give_experts(reference, model)
    found = through_kernels(monkeypatch, lambda: in_pieces(model, ids, [0, 6, 7, 8]))
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor(np.array(ids)), use_cache=False).logits.numpy()
    assert_equal(found, expected, tolerance=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_verifying_and_rolling_back(monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint, kind: Kind) -> None:
    model, ids = load(checkpoint(kind)), tokens(26)

    def verify_four_keep_two() -> np.ndarray:
        cache = model.make_cache()
        mx.eval(model(ids[:, :20], cache))
        verified, _, tape = model.step(ids[:, 20:24], cache.state, tape=True)
        assert tape is not None
        cache.state = tape.keep([2])
        verified = model.logits(verified)
        return np.array(mx.concatenate([verified, model(ids[:, 24:], cache)], axis=1))

    found = through_kernels(monkeypatch, verify_four_keep_two)
    assert_equal(found, verify_four_keep_two())


@pytest.mark.parametrize("kind", KINDS)
def test_every_operation_of_a_decoded_token_is_a_kernel(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint, kind: Kind
) -> None:
    model = load(checkpoint(kind))
    monkeypatch.setenv("MLX_QWEN_KERNELS", "metal")
    with emulated():
        cache = model.make_cache()
        mx.eval(model(tokens(20), cache))
        reset_stats()
        mx.eval(model(tokens(1), cache))
    counts = stats()
    assert {"gated_delta_mixer", "add_rms_norm", "rms_norm"} <= set(counts)
    assert all(not op.reference for op in counts.values()), counts


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_with_kernels_on_half_the_heads_and_experts(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint, kind: Kind
) -> None:
    path, ids, edges = checkpoint(kind), tokens(12), [0, 10, 11, 12]

    def together() -> np.ndarray:
        def rank(group: Any) -> np.ndarray:
            model = load_model(path, ModelConfig.from_directory(path), group=group)
            return in_pieces(model, ids, edges)

        first, second = in_threads(2, rank, monkeypatch)
        assert np.array_equal(first, second)
        return first

    assert_equal(through_kernels(monkeypatch, together), in_pieces(load(path), ids, edges))
