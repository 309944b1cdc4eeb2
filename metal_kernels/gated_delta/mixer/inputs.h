// What the recurrence of one value head takes from T tokens: its q, k and v through convolution and SiLU, q and k of
// unit length, and the two gates. All of it goes to threadgroup memory, token by token: [T, 2 DK + DV] and [T] gates.
#pragma once

#include <metal_stdlib>
#include "../head.h"
#include "pointwise.h"

namespace mlx_qwen {

struct Thread {
  uint index;
  uint lane;
  uint simdgroup;
};

/// Which tokens of a sequence are real; all are when nothing is masked.
template <bool MASKED, typename Mask>
struct RealTokens {
  Mask mask;
  const constant int64_t* strides;
  uint batch;

  bool has(uint t) const {
    return !MASKED || mask[batch * strides[0] + t * strides[1]];
  }
};

/// Convolves the head's channels of `rows` [B, T, channels...] into `tokens`, and writes the last W - 1 inputs.
template <typename E, int T, int DK, int DV, int W, int THREADS, typename ConvE, typename Real>
void convolve(
    const device E* rows,
    const constant int64_t* row_strides,
    const device ConvE* weight,
    const constant int64_t* weight_strides,
    const device E* state,
    const constant int64_t* state_strides,
    device E* new_state,
    threadgroup float* tokens,
    Real real,
    Head head,
    uint thread_index) {
  constexpr int WIDTH = 2 * DK + DV;
  rows += head.batch * row_strides[0];
  state += head.batch * state_strides[0];
  new_state += static_cast<int64_t>(head.batch) * (W - 1) * head.channels;
  for (uint i = thread_index; i < WIDTH; i += THREADS) {
    const uint channel = head.channel<DK, DV>(i);
    float taps[W];
    // Unrolled, these stay in registers, and all loads are on their way before the first is needed.
    E window[W - 1 + T];
#pragma unroll
    for (int w = 0; w < W; ++w) {
      taps[w] = static_cast<float>(weight[channel * weight_strides[0] + w * weight_strides[1]]);
    }
#pragma unroll
    for (int w = 0; w < W - 1; ++w) {
      window[w] = state[w * state_strides[1] + channel * state_strides[2]];
    }
#pragma unroll
    for (int t = 0; t < T; ++t) {
      window[W - 1 + t] = real.has(t) ? rows[t * row_strides[1] + channel * row_strides[2]] : static_cast<E>(0.0f);
    }
#pragma unroll
    for (int t = 0; t < T; ++t) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < W; ++w) {
        sum += static_cast<float>(window[t + w]) * taps[w];
      }
      tokens[t * WIDTH + i] = silu(sum);
    }
    // Value heads that share a key head all convolve its channels; one of them writes their rows.
    if (head.first || i >= 2 * DK) {
#pragma unroll
      for (int w = 0; w < W - 1; ++w) {
        new_state[w * head.channels + channel] = window[T + w];
      }
    }
  }
}

/// Multiplies x [B, T, hidden] with the head's rows of b and a; `partials` [SIMD groups, T] gets each one's sums.
template <typename E, int T, int THREADS>
void project_gates(
    const device E* x,
    const constant int* x_shape,
    const constant int64_t* x_strides,
    const device E* weight,
    const constant int64_t* weight_strides,
    threadgroup float2* partials,
    Head head,
    Thread place) {
  x += head.batch * x_strides[0];
  const device E* b_row = weight + head.value * weight_strides[0];
  const device E* a_row = b_row + head.value_heads * weight_strides[0];
  float b[T] = {};
  float a[T] = {};
  for (int i = place.index; i < x_shape[2]; i += THREADS) {
    const float b_weight = static_cast<float>(b_row[i * weight_strides[1]]);
    const float a_weight = static_cast<float>(a_row[i * weight_strides[1]]);
#pragma unroll
    for (int t = 0; t < T; ++t) {
      const float value = static_cast<float>(x[t * x_strides[1] + i * x_strides[2]]);
      b[t] += value * b_weight;
      a[t] += value * a_weight;
    }
  }
#pragma unroll
  for (int t = 0; t < T; ++t) {
    const float2 sums = float2(metal::simd_sum(b[t]), metal::simd_sum(a[t]));
    if (place.lane == 0) {
      partials[place.simdgroup * T + t] = sums;
    }
  }
}

/// Scales the DK values of `row` to length `length`.
template <int DK>
void normalize(threadgroup float* row, float length, uint lane) {
  float squares = 0;
  for (uint i = lane; i < DK; i += 32) {
    squares += row[i] * row[i];
  }
  const float scale = metal::precise::rsqrt(metal::simd_sum(squares) + 1e-6f) * length;
  for (uint i = lane; i < DK; i += 32) {
    row[i] *= scale;
  }
}

/// Log decay and writing strength of a token from the SIMD groups' sums, which are `stride` apart.
template <typename E, int SIMDGROUPS>
float2 log_decay_and_beta(const threadgroup float2* partials, uint stride, float A_log, float dt_bias, uint lane) {
  const float2 part = lane < SIMDGROUPS ? partials[lane * stride] : float2(0.0f, 0.0f);
  // A projection outside the kernel would give values of type E.
  const float b = static_cast<float>(static_cast<E>(metal::simd_sum(part.x)));
  const float a = static_cast<float>(static_cast<E>(metal::simd_sum(part.y)));
  return float2(-metal::precise::exp(A_log) * softplus(a + dt_bias), sigmoid(b));
}

/// Normalizes q and k of every token and makes its gates, decay and writing strength: one job a SIMD group at a time.
template <typename E, int T, int DK, int DV, int SIMDGROUPS, bool TAPED, typename Real>
void finish_inputs(
    threadgroup float* tokens,
    const threadgroup float2* partials,
    threadgroup float2* gates,
    float A_log,
    float dt_bias,
    device float* tape_k,
    device float* tape_log_decay,
    Real real,
    Head head,
    Thread place) {
  for (uint job = place.simdgroup; job < 3 * T; job += SIMDGROUPS) {
    const uint t = job / 3;
    const uint row = head.batch * T + t;
    threadgroup float* q = tokens + t * (2 * DK + DV);
    threadgroup float* k = q + DK;
    if (job % 3 == 0) {
      normalize<DK>(q, metal::precise::rsqrt(static_cast<float>(DK)), place.lane);
    } else if (job % 3 == 1) {
      normalize<DK>(k, 1.0f, place.lane);
      for (uint i = place.lane; TAPED && head.first && i < DK; i += 32) {
        tape_k[(row * head.key_heads + head.key) * DK + i] = k[i];
      }
    } else {
      float2 gate = log_decay_and_beta<E, SIMDGROUPS>(partials + t, T, A_log, dt_bias, place.lane);
      gate = real.has(t) ? gate : float2(0.0f, 0.0f);
      if (place.lane == 0) {
        gates[t] = float2(metal::precise::exp(gate.x), gate.y);
      }
      if (TAPED && place.lane == 0) {
        tape_log_decay[row * head.value_heads + head.value] = gate.x;
      }
    }
  }
}

}  // namespace mlx_qwen
