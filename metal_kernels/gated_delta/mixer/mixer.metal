// A few tokens of a Gated DeltaNet layer, decoded or verified: all that lies between its wide input projection and its
// output projection, in one launch. A threadgroup owns one value head of one sequence and holds the head's state in
// registers while the tokens pass, so that every byte of it is read once and written once.

#include <metal_stdlib>
#include "inputs.h"

namespace mlx_qwen {

/// The factors weight * SiLU(z) of the outputs [T, DV] that a thread writes: every THREADS-th, from its own on.
template <typename E, int T, int DV, int THREADS>
struct OutputGates {
  float factors[(T * DV + THREADS - 1) / THREADS];

  template <typename NormE>
  void load(
      const device E* z,
      const constant int64_t* strides,
      const device NormE* weight,
      int64_t weight_stride,
      uint thread_index) {
#pragma unroll
    for (int n = 0; n * THREADS < T * DV; ++n) {
      const uint i = n * THREADS + thread_index;
      if (i < T * DV) {
        const float gate = static_cast<float>(z[i / DV * strides[1] + i % DV * strides[2]]);
        factors[n] = static_cast<float>(weight[i % DV * weight_stride]) * silu(gate);
      }
    }
  }

  /// Writes the gated RMSNorm of `values`, whose rows are `width` apart. A SIMD group stays within one row.
  void write(const threadgroup float* values, uint width, float eps, device E* y, uint y_stride, Thread place) const {
#pragma unroll
    for (int n = 0; n * THREADS < T * DV; ++n) {
      const uint i = n * THREADS + place.index;
      if (i < T * DV) {
        const threadgroup float* row = values + i / DV * width;
        float squares = 0;
        for (uint j = place.lane; j < DV; j += 32) {
          squares += row[j] * row[j];
        }
        const float scale = metal::precise::rsqrt(metal::simd_sum(squares) / DV + eps);
        y[i / DV * y_stride + i % DV] = static_cast<E>(row[i % DV] * scale * factors[n]);
      }
    }
  }
};

/// Of y [B, T, Hv DV], the states and the tape: what belongs to one value head. A mask or tape not given is null.
template <typename E, int T, int DK, int DV, int W, int ROWS, int SIMDGROUPS, bool MASKED, bool TAPED,
          typename ConvE, typename NormE, typename Decays, typename Biases, typename Mask>
void gated_delta_mixer(
    const device E* qkvz, const constant int64_t* qkvz_strides,
    const device E* x, const constant int* x_shape, const constant int64_t* x_strides,
    const device E* ba_weight, const constant int64_t* ba_weight_strides,
    const device ConvE* conv_weight, const constant int* conv_weight_shape, const constant int64_t* conv_weight_strides,
    Decays A_log, const constant int* A_log_shape, const constant int64_t* A_log_strides,
    Biases dt_bias, const constant int64_t* dt_bias_strides,
    const device NormE* norm_weight, const constant int64_t* norm_weight_strides,
    float eps,
    const device E* conv_state, const constant int64_t* conv_state_strides,
    const device float* state, const constant int64_t* state_strides,
    Mask mask, const constant int64_t* mask_strides,
    device E* y, device E* new_conv_state, device float* new_state,
    device float* tape_k, device float* tape_delta, device float* tape_log_decay,
    threadgroup float4* tokens, threadgroup float2* partials, threadgroup float2* gates,
    uint3 group, uint thread_index, uint lane, uint simdgroup) {
  constexpr int THREADS = 32 * SIMDGROUPS;
  constexpr uint WIDTH = 2 * DK + DV;
  const Head head = head_of<DK, DV>(group, A_log_shape[0], conv_weight_shape[0]);
  const Thread place{thread_index, lane, simdgroup};
  const RealTokens<MASKED, Mask> real{mask, mask_strides, head.batch};
  threadgroup float* scalars = reinterpret_cast<threadgroup float*>(tokens);

  // What is needed last is asked for first, and travels while the inputs are made.
  state += head.batch * state_strides[0] + head.value * state_strides[1];
  StatePart<DK, ROWS> part;
  RowLane at = row_lane_of<ROWS>(simdgroup, lane);
  part.load(state, state_strides[2], state_strides[3], at);
  OutputGates<E, T, DV, THREADS> output;
  const device E* z = qkvz + head.batch * qkvz_strides[0] + (head.channels + head.value * DV) * qkvz_strides[2];
  output.load(z, qkvz_strides, norm_weight, norm_weight_strides[0], thread_index);
  const float own_A_log = static_cast<float>(A_log[head.value * A_log_strides[0]]);
  const float own_dt_bias = static_cast<float>(dt_bias[head.value * dt_bias_strides[0]]);

  convolve<E, T, DK, DV, W, THREADS>(qkvz, qkvz_strides, conv_weight, conv_weight_strides, conv_state,
                                     conv_state_strides, new_conv_state, scalars, real, head, thread_index);
  project_gates<E, T, THREADS>(x, x_shape, x_strides, ba_weight, ba_weight_strides, partials, head, place);
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  finish_inputs<E, T, DK, DV, SIMDGROUPS, TAPED>(scalars, partials, gates, own_A_log, own_dt_bias, tape_k,
                                                 tape_log_decay, real, head, place);
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);

  const uint first_row = at.row;
  new_state += static_cast<int64_t>(head.batch * head.value_heads + head.value) * DV * DK;
  for (; at.row < DV; at.row += SIMDGROUPS * ROWS_AT_ONCE * ROWS) {
    if (at.row != first_row) {
      part.load(state, state_strides[2], state_strides[3], at);
    }
    for (int t = 0; t < T; ++t) {
      const threadgroup float4* q = tokens + t * WIDTH / 4;
      threadgroup float* values = scalars + t * WIDTH + 2 * DK;
      const uint written = ((head.batch * T + t) * head.value_heads + head.value) * DV;
      part.write(q + DK / 4, values, gates[t], TAPED ? tape_delta + written : nullptr, at);
      part.read(q, values, at);
    }
    part.store(new_state, at);
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  y += (static_cast<int64_t>(head.batch) * T * head.value_heads + head.value) * DV;
  output.write(scalars + 2 * DK, WIDTH, eps, y, head.value_heads * DV, place);
}

}  // namespace mlx_qwen
