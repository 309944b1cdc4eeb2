"""The convolution, gates and norm around the gated delta rule, and all of them together, against transformers."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet, Qwen3_5RMSNormGated, causal_conv1d_fn

from metal_kernels.gated_delta import Heads, Mixer, causal_conv, gated_delta_mixer, gated_rms_norm, log_decay_and_beta
from tests.metal_kernels.gated_delta.rule_oracle import as_numpy, relative_error

HK, HV, DK, DV = 2, 4, 8, 6
WIDTH = 2 * HK * DK + HV * DV


@pytest.fixture(autouse=True)
def _reference_backend(monkeypatch):
    monkeypatch.setenv("MLX_QWEN_KERNELS", "reference")


def normal(*shape, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def to_torch(x):
    return torch.from_numpy(np.array(x))


@pytest.mark.parametrize("T", [1, 2, 3, 4, 17, 150])
def test_convolution_equals_transformers(T):
    x, weight = normal(2, T, 10), normal(10, 4, 1, seed=1)
    y, _ = causal_conv(x, weight)
    expected = causal_conv1d_fn(to_torch(x).mT, to_torch(weight).squeeze(-1), activation="silu").mT
    assert relative_error(y, expected.numpy()) < 1e-6


@pytest.mark.parametrize("cuts", [[1], [2, 3], [20], list(range(1, 40))], ids=str)
@pytest.mark.parametrize("W", [2, 4])
def test_convolution_in_pieces_equals_at_once(cuts, W):
    x, weight = normal(2, 40, 10), normal(10, W, 1, seed=1)
    whole, last = causal_conv(x, weight)
    state, pieces = None, []
    for start, stop in zip([0, *cuts], [*cuts, 40], strict=True):
        piece, state = causal_conv(x[:, start:stop], weight, state)
        pieces.append(piece)
    assert relative_error(mx.concatenate(pieces, axis=1), as_numpy(whole)) < 1e-6
    assert mx.array_equal(state, last)
    assert mx.array_equal(last, x[:, 40 - W + 1 :])


def test_convolution_does_not_see_masked_inputs():
    x, weight = normal(1, 9, 10), normal(10, 4, 1, seed=1)
    y, state = causal_conv(x, weight, mask=mx.arange(9)[None] >= 5)
    alone, alone_state = causal_conv(x[:, 5:], weight)
    assert mx.array_equal(y[:, 5:], alone)
    assert mx.array_equal(state, alone_state)


def test_conv_state_does_not_keep_the_whole_input_in_memory():
    x, weight = normal(1, 4096, 64), normal(64, 4, 1, seed=1)
    mx.eval(x, weight)
    before = mx.get_active_memory()
    state = causal_conv(x, weight)[1]
    mx.eval(state)
    assert mx.get_active_memory() - before < 64 * 1024


def test_convolution_of_bf16_rounds_the_sum_once_and_silu_once():
    x, weight = normal(1, 30, 16).astype(mx.bfloat16), normal(16, 4, 1, seed=1).astype(mx.bfloat16)
    y, state = causal_conv(x, weight)
    window = np.concatenate([np.zeros((1, 3, 16)), as_numpy(x)], axis=1)
    exact = sum(window[:, w : w + 30] * as_numpy(weight)[:, w, 0] for w in range(4))
    rounded = as_numpy(mx.array(exact.astype(np.float32)).astype(mx.bfloat16))
    expected = rounded / (1 + np.exp(-rounded))
    assert y.dtype == state.dtype == mx.bfloat16
    assert np.mean(as_numpy(y) == as_numpy(mx.array(expected.astype(np.float32)).astype(mx.bfloat16))) > 0.99


def test_gated_norm_equals_transformers():
    x, z, weight = normal(2, 5, 3, DV), normal(2, 5, 3, DV, seed=1), normal(DV, seed=2)
    norm = Qwen3_5RMSNormGated(DV, eps=1e-6)
    norm.weight.data = to_torch(weight)
    expected = norm(to_torch(x), to_torch(z)).detach().numpy()
    assert relative_error(gated_rms_norm(x, z, weight, 1e-6), expected) < 1e-6


def test_gated_norm_of_bf16_is_no_farther_from_exact_than_transformers():
    x, z, weight = normal(64, 128), normal(64, 128, seed=1), normal(128, seed=2)
    x, z = x.astype(mx.bfloat16), z.astype(mx.bfloat16)
    norm = Qwen3_5RMSNormGated(128, eps=1e-6)
    norm.weight.data = to_torch(weight)
    exact = norm(*(torch.from_numpy(as_numpy(a)) for a in (x, z))).detach().numpy()
    theirs = norm(*(torch.from_numpy(as_numpy(a)).bfloat16() for a in (x, z))).detach().double().numpy()
    ours = gated_rms_norm(x, z, weight, 1e-6)
    assert ours.dtype == mx.bfloat16
    assert np.abs(as_numpy(ours) - exact).mean() < np.abs(theirs - exact).mean()


def test_gates_are_fp32_whatever_they_are_made_from():
    a, b, A_log, dt_bias = (normal(*s, seed=i) for i, s in enumerate([(2, 5, 4), (2, 5, 4), (4,), (4,)]))
    a, b, dt_bias = 30 * a.astype(mx.bfloat16), b.astype(mx.bfloat16), dt_bias.astype(mx.bfloat16)
    log_decay, beta = log_decay_and_beta(a, b, A_log, dt_bias)
    exact = -np.exp(as_numpy(A_log)) * np.logaddexp(as_numpy(a) + as_numpy(dt_bias), 0)
    assert log_decay.dtype == beta.dtype == mx.float32
    assert np.allclose(as_numpy(log_decay), exact, rtol=2e-6, atol=1e-12)
    assert np.allclose(as_numpy(beta), 1 / (1 + np.exp(-as_numpy(b))), rtol=1e-6)


class Layer:
    """A small Gated DeltaNet layer of transformers and its weights as the mixer takes them."""

    def __init__(self):
        config = Qwen3_5TextConfig(
            hidden_size=24,
            linear_num_key_heads=HK,
            linear_num_value_heads=HV,
            linear_key_head_dim=DK,
            linear_value_head_dim=DV,
            linear_conv_kernel_dim=4,
            num_hidden_layers=1,
            layer_types=["linear_attention"],
        )
        torch.manual_seed(0)
        self.torch = Qwen3_5GatedDeltaNet(config, 0).eval()
        with torch.no_grad():
            for p in self.torch.parameters():
                p.copy_(torch.randn_like(p) * (0.5 if p.ndim > 1 else 1.0))
        self.eps = config.rms_norm_eps

    def expected(self, x, mask=None):
        with torch.no_grad():
            return self.torch(to_torch(x), attention_mask=None if mask is None else to_torch(mask)).numpy()

    def __call__(self, x, conv_state=None, state=None, mask=None, dtype=mx.float32):
        t, weights = self.torch, {name: mx.array(p.detach().numpy()) for name, p in self.torch.named_parameters()}
        wide, narrow = (
            mx.concatenate([weights[f"in_proj_{name}.weight"] for name in names])
            for names in (("qkv", "z"), ("b", "a"))
        )
        mixed = gated_delta_mixer(
            (x @ wide.T).astype(dtype),
            x.astype(dtype),
            narrow.astype(dtype),
            Mixer(
                weights["conv1d.weight"].swapaxes(1, 2).astype(dtype),
                weights["A_log"],
                weights["dt_bias"],
                weights["norm.weight"],
                self.eps,
                Heads(t.num_k_heads, t.head_k_dim, t.num_v_heads, t.head_v_dim),
            ),
            conv_state=conv_state,
            state=state,
            mask=mask,
        )
        assert mixed.y.dtype == dtype
        return mixed.y.astype(mx.float32) @ weights["out_proj.weight"].T, mixed.conv_state, mixed.state


@pytest.fixture(scope="module")
def layer():
    return Layer()


@pytest.mark.parametrize("T", [1, 2, 7, 8, 63, 64, 65, 130, 257])
def test_mixer_equals_the_layer_of_transformers(layer, T):
    x = normal(2, T, 24, seed=T)
    assert relative_error(layer(x)[0], layer.expected(x)) < 1e-4


@pytest.mark.parametrize("cuts", [[1], [3, 40], list(range(1, 45))], ids=str)
def test_mixer_in_pieces_equals_at_once(layer, cuts):
    x = normal(2, 45, 24)
    conv_state, state, pieces = None, None, []
    for start, stop in zip([0, *cuts], [*cuts, 45], strict=True):
        y, conv_state, state = layer(x[:, start:stop], conv_state, state)
        pieces.append(y)
    assert relative_error(mx.concatenate(pieces, axis=1), layer.expected(x)) < 1e-4


@pytest.mark.parametrize("T", [5, 70])
def test_mixer_of_a_left_padded_batch_equals_each_sequence_alone(layer, T):
    x = normal(3, T, 24)
    padding = mx.array([0, 1, T - 2])
    mask = mx.arange(T)[None] >= padding[:, None]
    y, conv_state, state = layer(x, mask=mask)
    for i, start in enumerate(padding.tolist()):
        alone_y, alone_conv, alone_state = layer(x[i : i + 1, start:])
        assert relative_error(y[i : i + 1, start:], as_numpy(alone_y)) < 1e-5
        assert relative_error(conv_state[i : i + 1], as_numpy(alone_conv)) < 1e-6
        assert relative_error(state[i : i + 1], as_numpy(alone_state)) < 1e-5


@pytest.mark.parametrize("T", [1, 9])
def test_masked_tokens_leave_the_state_of_the_mixer_as_it_is(layer, T):
    _, conv_state, state = layer(normal(2, 20, 24))
    mask = mx.broadcast_to(mx.array([[False], [True]]), (2, T))
    _, _, after = layer(normal(2, T, 24, seed=1), conv_state, state, mask)
    assert mx.array_equal(after[0], state[0])
    assert not mx.allclose(after[1], state[1])


@pytest.mark.parametrize("T", [1, 40])
def test_mixer_of_bf16_stays_near_fp32(layer, T):
    x = normal(1, T, 24)
    y, conv_state, state = layer(x, dtype=mx.bfloat16)
    assert (conv_state.dtype, state.dtype) == (mx.bfloat16, mx.float32)
    assert relative_error(y, layer.expected(x)) < 2e-2


def test_mixer_names_the_row_width_it_needs():
    with pytest.raises(ValueError, match=r"qkvz is \(1, 1, 17\), expected \(1, 1, 16\) with 1 key heads of 4"):
        gated_delta_mixer(
            mx.zeros((1, 1, 17)),
            mx.zeros((1, 1, 3)),
            mx.zeros((2, 3)),
            Mixer(mx.zeros((12, 4, 1)), mx.zeros(1), mx.zeros(1), mx.zeros(4), 1e-6, Heads(1, 4, 1, 4)),
        )
